"""Chapter 18, exercise 3: find the silent bug. 第 18 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch18.py
"""


def buggy(weight, a, b, alpha):
    """Return the merged weight (out, in): W plus what the adapter adds. a: (R, in). b: (out, R)."""
    rank = len(b)
    return weight + alpha / rank * b @ a


def find_the_bug(merged):
    """Assert something that holds for a right ``merged(weight, a, b, alpha)`` and does not hold for ``buggy``.

    写断言：正确的 merged 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
