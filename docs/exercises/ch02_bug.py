"""Chapter 2, exercise 3: find the silent bug. 第 2 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch02.py
"""


def buggy(ids, tokens):
    """Return the text of ``ids``. tokens: the bytes of every id."""
    return "".join(tokens[i].decode("utf-8", errors="replace") for i in ids)


def find_the_bug(decode):
    """Assert something that holds for a right ``decode(ids, tokens)`` and does not hold for ``buggy``.

    写断言：正确的 decode 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
