"""Chapter 18, exercise 1. 第 18 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch18.py
"""


def best_error(change, rank):
    """Return the smallest squared error, a float, with which a matrix of rank ``rank`` can stand for ``change``.

    The error is the sum over all places of (change - matrix)². No training is needed.

    返回秩为 rank 的矩阵逼近 change 时最小的平方误差（浮点数），即所有位置上 (change - 矩阵)² 之和。不需要训练。

    Args:
        change: (out, in). rank: at least 1; may be larger than out and in.
    """
    raise NotImplementedError
