"""Chapter 11, exercise 3: find the silent bug. 第 11 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch11.py
"""

import torch


def buggy(bias, counts, speed):
    """Return the bias (E,) of the next step. counts: (E,) float, tokens that each expert had. speed: size of the step.

    返回下一步的偏置 (E,)。counts：每个专家分到的词元数；speed：步长。
    """
    even = counts.sum() / (counts > 0).sum()
    return bias + speed * torch.sign(even - counts)


def find_the_bug(next_bias):
    """Assert something that holds for a right ``next_bias(bias, counts, speed)`` and does not hold for ``buggy``.

    写断言：正确的 next_bias 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
