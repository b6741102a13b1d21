"""Chapter 21, exercise 3: find the silent bug. 第 21 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch21.py
"""


def buggy(losses, weights):
    """Return the weighted mean, a scalar, of the losses of all targets. losses, weights: (n,), weights above 0."""
    return (losses * weights).sum() / len(losses)


def find_the_bug(weighted_mean):
    """Assert something that holds for a right ``weighted_mean(losses, weights)`` and does not hold for ``buggy``.

    写断言：正确的 weighted_mean 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
