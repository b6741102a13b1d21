"""Chapter 26, exercise 1. 第 26 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch26.py
"""


def quantize(block):
    """Return (d, q): the scale, a float, and 32 ints from -127 to 127, so that d · q[i] is near to block[i].

    返回 (d, q)：缩放系数（浮点数），以及 32 个 -127 到 127 的整数，使 d · q[i] 尽量接近 block[i]。

    Args:
        block: 32 floats; all of them may be 0. 可以全为 0。
    """
    raise NotImplementedError
