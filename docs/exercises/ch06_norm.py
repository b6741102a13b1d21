"""Chapter 6, exercise 1. 第 6 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch06.py
"""


def rms_norm(x, weight, eps):
    """Return x / sqrt(mean(x²) + eps) · weight over the last dimension, in the dtype of x.

    返回 x / sqrt(mean(x²) + eps) · weight，在最后一维上计算，结果的 dtype 与 x 相同。

    Args:
        x: (..., D), float32 or float16. weight: (D,). eps: a float.
    """
    raise NotImplementedError
