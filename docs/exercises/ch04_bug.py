"""Chapter 4, exercise 3: find the silent bug. 第 4 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch04.py
"""

from itertools import pairwise


def buggy(documents):
    """Return the pairs (input, target) of a packed row, a list. documents: list of lists of ids."""
    row = [token for document in documents for token in document]
    return list(pairwise(row))


def find_the_bug(pairs):
    """Assert something that holds for a right ``pairs(documents)`` and does not hold for ``buggy``.

    写断言：正确的 pairs 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
