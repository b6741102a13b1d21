"""Answers with their reasoning: ``<think>…</think><answer>…</answer>``, taken apart, checked and compared.

The form is that of DeepSeek-R1 (2025), section 2.2.1: one block of thinking, then one answer, nothing else but blanks.
"""

import re
from decimal import Decimal
from typing import NamedTuple

from minillm.errors import UserError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile("|".join(map(re.escape, TAGS)))


class Reasoned(NamedTuple):
    """The two parts of an answer, without blanks around them."""

    thinking: str
    answer: str


def parse_reasoning(text: str) -> Reasoned:
    """Return the parts of ``text``.

    Raises:
        UserError: it has not the form; the message says where (an unclosed block, text outside, an empty answer).
    """
    found = _TAG.findall(text)
    for opening, closing in (TAGS[:2], TAGS[2:]):
        if opening in found and closing not in found:
            raise UserError(f"{opening} is never closed: add {closing}")
        if opening not in found:
            raise UserError(f"there is no {opening} in the answer; its form is {''.join(TAGS)} with texts inside")
    if found != list(TAGS):
        raise UserError(f"the tags come as {' '.join(found)}; they must come as {' '.join(TAGS)}, once each")
    before, thinking, between, answer, after = _TAG.split(text)
    outside = (before + between + after).strip()
    if outside:
        raise UserError(f"there is text outside of the blocks: {outside[:40]!r}")
    if not answer.strip():
        raise UserError("the answer between <answer> and </answer> is empty")
    return Reasoned(thinking.strip(), answer.strip())


def find_answer(text: str) -> str:
    """Return what stands between the last ``<answer>`` and its end, else the text behind the thinking; stripped.

    For scoring texts that may lack the form: a plain answer counts as the answer that it is.
    """
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        return rest.partition("</answer>")[0].strip()
    return text.rpartition("</think>")[2].strip()


def same_answer(answer: str, expected: str) -> bool:
    """Return whether two answers are equal: as numbers where both are (1,000.0 is 1000, $5 is 5), else as texts.

    A comma separates thousands only where it stands between groups of three digits, all of them: 1,234,567. So 3,5 and
    1,00 are not numbers, and equal nothing but themselves.
    """
    if answer.strip() == expected.strip():
        return True
    numbers = _number(answer), _number(expected)
    return None not in numbers and numbers[0] == numbers[1]


# A leading 0 has no thousands behind it: 0,500 is half in the countries that write it so.
_NUMBER = re.compile(r"[+-]?([1-9]\d{0,2}(,\d{3})+(\.\d*)?|\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def _number(text: str) -> Decimal | None:
    text = text.strip().strip("$¥€￥ ").replace("，", ",")
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
