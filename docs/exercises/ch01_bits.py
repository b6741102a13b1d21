"""Chapter 1, exercise 1. 第 1 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch01.py
"""


def bits_per_byte(loss, n_targets, text):
    """Return the bits that a model needs per UTF-8 byte of ``text``, a float.

    返回模型平均每个 UTF-8 字节需要多少比特（浮点数）。

    Args:
        loss: mean over the tokens of the text, in nats. n_targets: number of these tokens. text: a string.
    """
    raise NotImplementedError
