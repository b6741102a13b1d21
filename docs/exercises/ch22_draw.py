"""Chapter 22, exercise 1. 第 22 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch22.py
"""


def draw_token(probabilities, uniform):
    """Return the token, an int, that the number ``uniform`` in [0, 1) draws: F[i - 1] <= uniform < F[i].

    返回由 [0, 1) 中的数 uniform 抽到的词元（整数）：F[i - 1] <= uniform < F[i]，F 是累积和。

    Args:
        probabilities: (V,) float64, they add up to 1; some of them may be 0. 其中可以有 0。
    """
    raise NotImplementedError
