"""Chapter 4, exercise 2. 第 4 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch04.py
"""


def mask(document_ids):
    """Return (T, T) bool, true where the row's token may look at the column's token.

    返回 (T, T) 的布尔张量：行对应的词元可以看列对应的词元时为真。

    Args:
        document_ids: (T,) the number of each token's document; -1 is padding, which looks at itself alone.
    """
    raise NotImplementedError
