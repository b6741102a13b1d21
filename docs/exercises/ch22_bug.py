"""Chapter 22, exercise 3: find the silent bug. 第 22 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch22.py
"""

import torch


def buggy(logits, seen, penalty):
    """Return logits (B, V) with the tokens marked in ``seen`` (B, V, bool) made less likely."""
    return torch.where(seen, logits / penalty, logits)


def find_the_bug(penalize):
    """Assert something that holds for a right ``penalize(logits, seen, penalty)`` and does not hold for ``buggy``.

    写断言：正确的 penalize 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
