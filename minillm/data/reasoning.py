"""Answers with reasoning, ``<think>…</think><answer>…</answer>``: parse, check and compare them.

The form is that of DeepSeek-R1 (2025), section 2.2.1: one block of thinking, then one answer, otherwise only white
space.
"""

import re
from decimal import Decimal
from typing import NamedTuple

from minillm.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
DIRECT = "<think>\n\n</think>\n<answer>\n"  # the beginning of an answer without thinking
_TAG = re.compile("|".join(map(re.escape, TAGS)))


class Reasoned(NamedTuple):
    """The two parts of an answer, without white space around them."""

    thinking: str
    answer: str


def parse_reasoning(text: str) -> Reasoned:
    """Return the parts of ``text``.

    Raises:
        UserError: ``text`` has another form; the message says why (an unclosed block, text outside, an empty answer).
    """
    tags = _TAG.findall(text)
    for opening, closing in (TAGS[:2], TAGS[2:]):
        if opening in tags and closing not in tags:
            raise UserError(f"{opening} is never closed: add {closing}")
        if opening not in tags:
            raise UserError(f"there is no {opening} in the answer; its form is {''.join(TAGS)} with texts inside")
    if tags != list(TAGS):
        raise UserError(f"the tags are {' '.join(tags)}; they must be {' '.join(TAGS)}, in this order and once each")
    before, thinking, between, answer, after = _TAG.split(text)
    text_outside = (before + between + after).strip()
    if text_outside:
        raise UserError(f"there is text outside of the blocks: {text_outside[:40]!r}")
    if not answer.strip():
        raise UserError("the answer between <answer> and </answer> is empty")
    return Reasoned(thinking.strip(), answer.strip())


def find_answer(text: str) -> str:
    """Return the text in the last ``<answer>`` block, or without one the text after the thinking; stripped.

    For scoring texts of any form: a plain answer is returned unchanged.
    """
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        return rest.partition("</answer>")[0].strip()
    return text.rpartition("</think>")[2].strip()


def same_answer(answer: str, expected: str) -> bool:
    """Return whether two answers are equal: as numbers if both are numbers (1,000.0 is 1000, $5 is 5), else as texts.

    A comma separates thousands only in groups of three digits: 1,234,567. So 3,5 and 1,00 are texts, and equal only to
    themselves.
    """
    if answer.strip() == expected.strip():
        return True
    numbers = _number(answer), _number(expected)
    return None not in numbers and numbers[0] == numbers[1]


# No thousands after a leading 0: in some countries 0,500 means one half.
_NUMBER = re.compile(r"[+-]?([1-9]\d{0,2}(,\d{3})+(\.\d*)?|\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _number(text: str) -> Decimal | None:
    """Return the number that ``text`` is, or None; a currency or percent sign around it is ignored."""
    text = text.strip().strip("$¥€￥ ").replace("，", ",")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
