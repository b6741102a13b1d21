"""Chapter 29, exercise 2. 第 29 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch29.py
"""


def best_split(compute, *, a, alpha, b, beta):
    """Return (parameters N, tokens D) with 6ND = compute for which a / N**alpha + b / D**beta is least.

    返回满足 6ND = compute、使 a / N**alpha + b / D**beta 最小的（参数量 N，词元数 D）。
    """
    raise NotImplementedError
