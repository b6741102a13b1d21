"""Chapter 30, exercise 2. 第 30 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch30.py
"""


def split_step(n_rows, n_ranks, max_rows):
    """Return ``(batch_size, accumulation_steps)`` of each rank for steps of exactly ``n_rows`` rows over all ranks.

    The batch size is the largest that works with at most ``max_rows`` rows in memory. ``n_rows`` is a multiple of
    ``n_ranks``.

    返回每个进程的 (batch_size, accumulation_steps)：所有进程合起来，一步恰好 n_rows 行。
    batch_size 在不超过 max_rows 的前提下取最大。n_rows 是 n_ranks 的倍数。

    Args:
        n_rows: rows of one update. 一次更新的行数。
        n_ranks: processes that work together. 进程数。
        max_rows: rows that fit into the memory of one rank. 一个进程的显存放得下的行数。
    """
    raise NotImplementedError
