"""Chapter 13, exercise 3: find the silent bug. 第 13 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch13.py
"""

import torch


def buggy(gradients, max_norm):
    """Return the gradients, a list of tensors, clipped to a global norm of at most max_norm."""
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * (max_norm / (norm + 1e-6)) for gradient in gradients]


def find_the_bug(clip):
    """Assert something that holds for a right ``clip(gradients, max_norm)`` and does not hold for ``buggy``.

    写断言：正确的 clip 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
