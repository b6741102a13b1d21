"""Chapter 5, exercise 2. 第 5 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch05.py
"""


def entropy(probabilities):
    """Return the entropy in nats, a float, of probabilities (V,) that add up to 1; some of them may be 0.

    返回概率分布 (V,) 的熵（浮点数，单位奈特）；概率之和为 1，其中可以有 0。
    """
    raise NotImplementedError
