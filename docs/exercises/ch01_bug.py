"""Chapter 1, exercise 3: find the silent bug. 第 1 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch01.py
"""


def buggy(steps):
    """Return the tokens per second of a run. steps: list of (number of tokens, seconds)."""
    rates = [n_tokens / seconds for n_tokens, seconds in steps]
    return sum(rates) / len(rates)


def find_the_bug(tokens_per_second):
    """Assert something that holds for a right ``tokens_per_second(steps)`` and does not hold for ``buggy``.

    写断言：正确的 tokens_per_second 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
