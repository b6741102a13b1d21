"""Chapter 25, exercise 2. 第 25 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch25.py
"""


def mixture(available, shares, size):
    """Return how many records of each source are written, a list of ints, rounded to whole records.

    返回每个来源写出的记录数（整数列表，四舍五入到整条）。

    Args:
        available: records of each source. 各来源现有的记录数。
        shares: of each source, positive, but they need not add up to 1. 各来源的份额，为正数，总和不一定是 1。
        size: "smallest": as many as possible without writing any record twice; "largest": as few as possible so that
            every record is written. "smallest"：任何记录都不重复，总数尽量大；"largest"：每条记录都写到，总数尽量小。
    """
    raise NotImplementedError
