"""Chapter 10, exercise 2. 第 10 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch10.py
"""


def gated_width(hidden_size, multiple=64):
    """Return the smallest multiple of ``multiple``, an int, with which three matrices have at least 8 D² parameters.

    返回 multiple 的倍数中最小的一个（整数），使三个矩阵的参数不少于 8 D²。
    """
    raise NotImplementedError
