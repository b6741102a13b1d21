"""Chapter 2, exercise 2. 第 2 章，练习 2。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch02.py
"""


def encode(text, merges):
    """Return the tokens of one piece of text, a list of strings: the merges are applied in the order of learning.

    返回一个片段的词元（字符串列表）：按学习的先后顺序应用合并规则。

    Args:
        text: its letters are the tokens to begin with. merges: list of tuples of two strings, first learned first.
    """
    raise NotImplementedError
