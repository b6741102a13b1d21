"""Chapter 27, exercise 1. 第 27 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch27.py
"""


def slots(pages, start, end, page_len):
    """Return the slots of the positions ``start`` to ``end - 1`` of a request, a list of ints.

    返回一个请求从位置 start 到 end - 1 的 slot（整数列表）。

    Args:
        pages: its page numbers, in order; page n has the slots from n · page_len on. 请求的页号，按顺序。
    """
    raise NotImplementedError
