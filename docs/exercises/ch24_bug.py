"""Chapter 24, exercise 3: find the silent bug. 第 24 章，练习 3：找出沉默的错误。

MINILLM_EXERCISES=1 pytest tests/exercises/test_ch24.py
"""

import re

CONTROL = {"<|im_start|>": 1, "<|im_end|>": 2}  # every other character is its own id, at least 3


def encode_text(text):
    """Return the ids of plain text, one per character."""
    return [ord(character) + 3 for character in text]


def buggy(messages):
    """Return the ids of a conversation, a list of (role, content), in ChatML."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    parts = re.split("(" + "|".join(map(re.escape, CONTROL)) + ")", text)
    return [token for part in parts for token in ([CONTROL[part]] if part in CONTROL else encode_text(part))]


def find_the_bug(encode):
    """Assert something that holds for a right ``encode(messages)`` and does not hold for ``buggy``.

    写断言：正确的 encode 能通过，上面的 buggy 通不过。
    """
    raise NotImplementedError
