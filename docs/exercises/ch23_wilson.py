"""Chapter 23, exercise 2. 第 23 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch23.py
"""


def wilson(n_correct, n, z=1.96):
    """Return the two ends of Wilson's interval, floats, for ``n_correct`` right answers to ``n`` questions.

    返回 n 道题答对 n_correct 道时 Wilson 区间的两端（浮点数）。
    """
    raise NotImplementedError
