"""Chapter 5, exercise 3: find the silent bug. 第 5 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch05.py
"""

import torch


def buggy(micro_batches):
    """Return the mean loss of a step. micro_batches: list of (losses (n,), is_target (n,) bool)."""
    means = []
    for losses, is_target in micro_batches:
        loss_sum = (losses * is_target).sum()
        means.append(loss_sum / is_target.sum().clamp(min=1))
    return torch.stack(means).mean()


def find_the_bug(step_loss):
    """Assert something that holds for a right ``step_loss(micro_batches)`` and does not hold for ``buggy``.

    写断言：正确的 step_loss 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
