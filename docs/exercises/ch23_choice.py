"""Chapter 23, exercise 1. 第 23 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch23.py
"""


def choose_per_byte(log_likelihoods, choices):
    """Return the index of the choice with the highest log-likelihood per byte of its UTF-8 text.

    返回按 UTF-8 字节平均，对数似然最高的选项的序号。

    Args:
        log_likelihoods: one per choice, in nats, summed over its tokens. 每个选项一个，对词元求和。
        choices: their texts. 选项的文本。
    """
    raise NotImplementedError
