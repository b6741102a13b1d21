"""Chapter 11, exercise 1. 第 11 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch11.py
"""


def route(scores, bias, n_chosen):
    """Return (chosen, weights), each (N, k): the experts with the largest score + bias, and what they count.

    The weights of a token add up to 1, in proportion to the scores without the bias.

    返回 (chosen, weights)，形状都是 (N, k)：分数加偏置最大的 k 个专家，以及它们的权重。一个词元的权重
    之和为 1，与不带偏置的分数成正比。

    Args:
        scores: (N, E), positive 正数. bias: (E,). n_chosen: k.
    """
    raise NotImplementedError
