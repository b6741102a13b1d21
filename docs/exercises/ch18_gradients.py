"""Chapter 18, exercise 2. 第 18 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch18.py
"""


def lora_gradients(inputs, output_gradient, a, b, alpha):
    """Return the gradients of A and B, in the shapes of A and B, without autograd.

    The layer computes y = W x + (alpha / R) B A x for every row x of ``inputs``.

    不用自动求导，返回 A 与 B 的梯度，形状分别与 A、B 相同。层对 inputs 的每一行 x 计算 y = W x + (alpha / R) B A x。

    Args:
        inputs: (n, in). output_gradient: (n, out), the loss's gradient with respect to y. a: (R, in). b: (out, R).
    """
    raise NotImplementedError
