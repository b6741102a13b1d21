"""Chapter 21, exercise 1. 第 21 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch21.py
"""


def estimate(n, n_right, k):
    """Return the probability, a float, that k samples, drawn from these n without repetition, hold a right one.

    返回从 n 个样本（其中 n_right 个正确）里不重复地抽 k 个，至少有一个正确的概率（浮点数）。
    """
    raise NotImplementedError
