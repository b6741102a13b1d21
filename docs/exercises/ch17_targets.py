"""Chapter 17, exercise 1. 第 17 章，练习 1。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch17.py
"""


def targets_of(turns):
    """Return (input_ids, targets) of a conversation, two lists of equal length.

    ``targets[t]`` is the token after ``input_ids[t]``, or -100 if it does not belong to an answer.

    返回一段对话的 (input_ids, targets)，两个等长的列表。targets[t] 是 input_ids[t] 之后的词元；它不属于回答时为 -100。

    Args:
        turns: list of (is_answer, ids). The ids of an answer end with the end mark, which is a target too. The first
            turn is not an answer.
    """
    raise NotImplementedError
