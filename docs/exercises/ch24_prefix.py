"""Chapter 24, exercise 2. 第 24 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch24.py
"""


def is_learned_prompt(prompt, ids, mask):
    """Return whether a prompt is a beginning of the training row ``ids`` behind which the model learned to begin.

    In the middle of an answer it goes on, it does not begin.

    返回：prompt 是不是训练行 ids 的开头，并且模型学过从它后面开始回答（回答到一半是继续，不是开始）。

    Args:
        prompt, ids: lists of ids. mask: 1 where an id is a target. 目标处为 1。
    """
    raise NotImplementedError
