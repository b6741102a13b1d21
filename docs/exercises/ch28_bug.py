"""Chapter 28, exercise 3: find the silent bug. 第 28 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch28.py
"""


def buggy(pieces, stop):
    """Return what a reader sees of an answer that arrives in ``pieces``: the text before ``stop``."""
    shown = ""
    for piece in pieces:
        before, found, _ = piece.partition(stop)
        shown += before
        if found:
            break
    return shown


def find_the_bug(shown):
    """Assert something that holds for a right ``shown(pieces, stop)`` and does not hold for ``buggy``.

    写断言：正确的 shown 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
