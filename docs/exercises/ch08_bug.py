"""Chapter 8, exercise 3: find the silent bug. 第 8 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch08.py
"""

import torch


def buggy(document_ids):
    """Return (B, T), the position of each token in its own document, from 0. document_ids: (B, T).

    返回每个词元在自己文档里的位置 (B, T)，从 0 开始。
    """
    index = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] > document_ids[:, :-1]
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def find_the_bug(positions):
    """Assert something that holds for a right ``positions(document_ids)`` and does not hold for ``buggy``.

    Equal numbers side by side are one document; another number begins the next one. -1 is padding; its
    positions are counted in the same way.

    写断言：正确的 positions 能通过，上面的 buggy 通不过。相邻且相等的编号是同一篇文档，编号一变就是下一篇。-1 是填充，
    位置的数法相同。
    """
    raise NotImplementedError
