"""Chapter 29, exercise 3: find the silent bug. 第 29 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch29.py
"""


def buggy(tokens_per_s, *, n_parameters, peak, recomputes):
    """Return the MFU of a run. recomputes: whether --gradient_checkpointing runs every block forward twice."""
    n_passes = 4 if recomputes else 3  # a forward pass is 2N, a backward pass 4N
    return tokens_per_s * 2 * n_parameters * n_passes / peak


def find_the_bug(mfu):
    """Assert something that holds for a right ``mfu``, called like ``buggy``, and does not hold for ``buggy``.

    写断言：正确的 mfu 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
