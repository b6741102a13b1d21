"""Chapter 14, exercise 1. 第 14 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch14.py
"""


def dead_zone(weight):
    """Return half the distance between bfloat16 numbers of the size of ``weight``, a float: smaller updates are lost.

    weight is a float, not zero, of a size between 2^E and 2^(E + 1); bfloat16 has 7 bits of fraction.

    返回 weight（非零浮点数）所在区间里 bfloat16 间距的一半（浮点数）：比它小的更新会丢失。bfloat16 的尾数有 7 位。
    """
    raise NotImplementedError
