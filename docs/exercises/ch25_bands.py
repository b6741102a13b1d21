"""Chapter 25, exercise 1. 第 25 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch25.py
"""


def candidate_probability(similarity, n_bands, n_rows):
    """Return the probability that two records of this Jaccard index have an equal band.

    A signature has n_bands bands of n_rows numbers. Each number is equal with the probability ``similarity``,
    independently of the others. A band is equal if all its numbers are.

    返回 Jaccard 系数为 similarity 的两条记录至少有一个条带相同的概率。
    签名分成 n_bands 个条带，每个 n_rows 个数；每个数相同的概率是 similarity，相互独立。
    整个条带的数都相同，条带才算相同。
    """
    raise NotImplementedError
