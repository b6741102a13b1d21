"""Chapter 24, exercise 1. 第 24 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch24.py
"""


def answer_mask(turns, end_id):
    """Return the mask of a conversation, a list of 0 and 1, one per id.

    返回一段对话的掩码：由 0 和 1 组成的列表，每个 id 一个。

    Args:
        turns: list of (role, header, body): header and body are lists of ids. The body of each turn is its content,
            then ``end_id``, then the ids of a newline. 每一轮的 body 是内容、end_id、换行的 id。
    """
    raise NotImplementedError
