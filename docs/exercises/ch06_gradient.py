"""Chapter 6, exercise 2. 第 6 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch06.py
"""


def rms_norm_gradient(x, grad):
    """Return the gradient (N, D) at ``x`` of y = x / sqrt(mean(x²)), without autograd.

    返回 y = x / sqrt(mean(x²)) 在 x 处的梯度 (N, D)，不用自动求导。

    Args:
        x: (N, D). grad: (N, D), the loss's gradient at y.
    """
    raise NotImplementedError
