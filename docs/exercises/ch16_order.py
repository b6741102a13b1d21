"""Chapter 16, exercise 1. 第 16 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch16.py
"""


def rows_of_step(step, *, n_rows, rows_per_step, seed):
    """Return the numbers of the rows, an array, that update number ``step`` (from 0, over all epochs) sees.

    An epoch's order is np.random.default_rng([seed, epoch]).permutation(n_rows). Its last step holds what is left,
    and the next step begins the next epoch.

    返回第 step 次更新（从 0 数起，跨所有轮次）看到的行号（数组）。每一轮的顺序是
    np.random.default_rng([seed, epoch]).permutation(n_rows)；最后一步是剩下的行，下一步开始新的一轮。
    """
    raise NotImplementedError
