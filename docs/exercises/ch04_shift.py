"""Chapter 4, exercise 1. 第 4 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch04.py
"""


def shift(stored, is_answer):
    """Return (input_ids, targets), two lists of len(stored) - 1; targets outside the answers are -100.

    返回 (input_ids, targets) 两个列表，长度都是 len(stored) - 1；不属于回答的目标是 -100。

    Args:
        stored: the ids of a conversation. is_answer: for each of them 1 if it belongs to an answer, else 0.
    """
    raise NotImplementedError
