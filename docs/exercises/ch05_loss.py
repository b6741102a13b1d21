"""Chapter 5, exercise 1. 第 5 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch05.py
"""


def mean_loss(logits, targets):
    """Return the mean of -ln p(target), a scalar, over the positions whose target is not -100; 0 if there is none.

    返回所有目标不是 -100 的位置上 -ln p(target) 的平均值（标量）；一个都没有时返回 0。

    Args:
        logits: (B, T, V). targets: (B, T).
    """
    raise NotImplementedError
