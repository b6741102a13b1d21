"""Chapter 19, exercise 2. 第 19 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch19.py
"""


def best_margin(share, beta):
    """Return the Delta in nats, a float, at which the mean DPO loss is smallest.

    A share of the people (above 0, below 1) chooses the first answer, the others choose the second. Delta is
    ln(policy / reference) of the first answer minus that of the second.

    返回使平均 DPO 损失最小的 Delta（浮点数，单位奈特）。比例为 share 的人选第一个回答，其余的人选第二个。
    Delta 是第一个回答的 ln(策略 / 参考) 减去第二个的。
    """
    raise NotImplementedError
