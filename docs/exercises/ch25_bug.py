"""Chapter 25, exercise 3: find the silent bug. 第 25 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch25.py
"""

import random


def buggy(texts, ratio):
    """Return for each text whether it is held out for validation, a list of bools; the same in every run."""
    rng = random.Random(42)
    return [rng.random() < ratio for _ in texts]


def find_the_bug(held_out):
    """Assert something that holds for a right ``held_out(texts, ratio)`` and does not hold for ``buggy``.

    写断言：正确的 held_out 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
