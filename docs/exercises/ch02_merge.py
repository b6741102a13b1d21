"""Chapter 2, exercise 1. 第 2 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch02.py
"""


def merge(ids, pair, new_id):
    """Return a new list in which each occurrence of ``pair`` in ``ids``, from left to right, is ``new_id``.

    返回一个新列表：从左到右，把 ids 中每一处 pair 换成 new_id。不要改动 ids。

    Args:
        ids: list of int; it must not change. pair: tuple of two ids. new_id: int.
    """
    raise NotImplementedError
