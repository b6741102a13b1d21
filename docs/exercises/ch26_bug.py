"""Chapter 26, exercise 3: find the silent bug. 第 26 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch26.py
"""

import torch


def buggy(row):
    """Return a row of weights (n·32,) as it comes back from q8_0."""
    scale = row.abs().max().clamp(min=1e-30) / 127
    return torch.round(row / scale) * scale


def find_the_bug(there_and_back):
    """Assert something that holds for a right ``there_and_back(row)`` and does not hold for ``buggy``.

    A right one also rounds its scales to float16. 正确的实现还会把缩放系数舍入到 float16。
    写断言：正确的 there_and_back 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
