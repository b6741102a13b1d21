"""Chapter 10, exercise 3: find the silent bug. 第 10 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch10.py
"""

import torch


def buggy(gate, up, grad):
    """Return the gradients of gate and of up, of silu(gate) · up, for the gradient ``grad`` of that product.

    返回 silu(gate) · up 对 gate 和 up 的梯度；grad 是这个乘积的梯度。
    """
    share = torch.sigmoid(gate)
    return grad * up * share, grad * gate * share


def find_the_bug(gradients):
    """Assert something that holds for a right ``gradients(gate, up, grad)`` and does not hold for ``buggy``.

    写断言：正确的 gradients 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
