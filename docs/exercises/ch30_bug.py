"""Chapter 30, exercise 3: find the silent bug. 第 30 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch30.py
"""

import math


def buggy(losses):
    """Return whether an update may be applied: all losses of its micro-batches, a list of floats, are finite.

    返回这次更新能不能做：各微批的损失（浮点数列表）必须全是有限的数。
    """
    return -math.inf < min(losses) and max(losses) < math.inf


def find_the_bug(may_update):
    """Assert something that holds for a right ``may_update(losses)`` and does not hold for ``buggy``.

    写断言：正确的 may_update 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
