"""Chapter 22, exercise 2. 第 22 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch22.py
"""


def nucleus(probabilities, p):
    """Return the tokens that top-p keeps, a set of ints: the fewest most probable ones that together reach ``p``.

    返回 top-p 留下的词元（整数集合）：从概率最大的取起，概率之和达到 p，个数最少。

    Args:
        probabilities: (V,), in no particular order, no two alike. 未排序，互不相等。
    """
    raise NotImplementedError
