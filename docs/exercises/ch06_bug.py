"""Chapter 6, exercise 3: find the silent bug. 第 6 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch06.py
"""


def buggy(x):
    """Return x (B, T, D) scaled to a mean square of one."""
    return x / x.square().mean(dim=(-2, -1), keepdim=True).sqrt()


def find_the_bug(norm):
    """Assert something that holds for a right ``norm(x)`` and does not hold for ``buggy``.

    写断言：正确的 norm 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
