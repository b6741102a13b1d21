"""Chapter 16, exercise 3: find the silent bug. 第 16 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch16.py
"""


def buggy(model):
    """Return the weights of a torch module as they are now, by name, to be written in the background."""
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def find_the_bug(snapshot):
    """Assert something that holds for a right ``snapshot(module)`` and does not hold for ``buggy``.

    写断言：正确的 snapshot 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
