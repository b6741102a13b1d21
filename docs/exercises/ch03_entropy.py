"""Chapter 3, exercise 2. 第 3 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch03.py
"""


def conditional_entropy(counts):
    """Return the mean loss in nats, a float, of the best model that sees one token; 0 · ln 0 counts as 0.

    返回只看一个词元的最佳模型的平均损失（浮点数，单位奈特）；0 · ln 0 按 0 算。

    Args:
        counts: (V, V), a tensor of whole numbers: how often the column's token follows the row's token. A row may be
            empty. 整数张量 (V, V)：列对应的词元跟在行对应的词元后面多少次；可以有全零的行。
    """
    raise NotImplementedError
