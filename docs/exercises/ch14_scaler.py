"""Chapter 14, exercise 2. 第 14 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch14.py
"""


def next_scale(scale, n_good, is_finite, *, interval=2000):
    """Return (scale, n_good) after one more update: the loss scale, and the good updates since it last changed.

    A gradient that is not finite halves the scale. The ``interval``-th good update in a row doubles it.

    返回一次更新之后的 (scale, n_good)：损失缩放系数，以及它上次改变以来连续正常更新的次数。
    出现非有限的梯度就减半；连续第 interval 次正常更新时翻倍。
    """
    raise NotImplementedError
