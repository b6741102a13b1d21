"""Chapter 3, exercise 3: find the silent bug. 第 3 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch03.py
"""

import torch


def buggy(embedding, head):
    """Make the output layer ``head`` (nn.Linear without bias) use the table of ``embedding`` (nn.Embedding)."""
    with torch.no_grad():
        head.weight.copy_(embedding.weight)


def find_the_bug(tie):
    """Assert something that holds for a right ``tie(embedding, head)`` and does not hold for ``buggy``.

    写断言：正确的 tie 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
