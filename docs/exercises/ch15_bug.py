"""Chapter 15, exercise 2: find the silent bug. 第 15 章，练习 2：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch15.py
"""


def buggy(losses_of_ranks):
    """Return the loss of a step, the mean over all its targets. losses_of_ranks: a tensor (n,) for every rank."""
    n_step = sum(len(losses) for losses in losses_of_ranks)
    shares = [losses.sum() / n_step for losses in losses_of_ranks]  # each rank's part of the mean
    return sum(shares) / len(shares)  # what DDP does


def find_the_bug(step_loss):
    """Assert something that holds for a right ``step_loss(losses_of_ranks)`` and does not hold for ``buggy``.

    写断言：正确的 step_loss 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
