"""Chapter 17, exercise 2. 第 17 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch17.py
"""


def n_replayed(n_new, share):
    """Return how many old rows must join n_new new ones so that they are ``share`` of all rows; at least 1.

    返回要加入多少行旧数据，才能使它们占全部行的 share；至少 1 行。

    Args:
        share: above 0, below 1. Round to the nearest whole number.
    """
    raise NotImplementedError
