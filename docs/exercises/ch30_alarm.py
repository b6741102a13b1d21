"""Chapter 30, exercise 1. 第 30 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch30.py
"""


def first_alarm(losses, vocab_size):
    """Return the first step, counted from 1, at which a run is worse than guessing; None if there is none.

    The mean of the losses so far, in which each step back counts 0.95 times as much, is then more than half a nat above
    that of a guesser. So a single step of 30 after twenty steps of 3 is no alarm.

    返回训练第一次比瞎猜还差的步数（从 1 数起），没有就返回 None。判断用的是到目前为止的加权平均损失：
    每往回一步，权重乘 0.95；它比瞎猜的损失高出半个奈特以上才算。所以在二十步 3 之后单独一步 30 不算。

    Args:
        losses: the mean loss of each step, a list of floats. 每步的平均损失。
        vocab_size: V, the number of tokens. 词表大小。
    """
    raise NotImplementedError
