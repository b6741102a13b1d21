"""Chapter 12, exercise 3: find the silent bug. 第 12 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch12.py
"""


def buggy(model):
    """Return the number of parameters of a torch module."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def find_the_bug(count):
    """Assert something that holds for a right ``count(module)`` and does not hold for ``buggy``.

    写断言：正确的 count 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
