"""Chapter 17, exercise 3: find the silent bug. 第 17 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch17.py
"""

import torch


def buggy(ids, mask):
    """Return the targets (T,) of a row. ids, mask: (T + 1,); the mask is 1 where a token belongs to an answer."""
    return torch.where(mask[:-1] == 1, ids[1:], -100)


def find_the_bug(targets):
    """Assert something that holds for a right ``targets(ids, mask)`` and does not hold for ``buggy``.

    写断言：正确的 targets 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
