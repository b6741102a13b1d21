"""The thinking in the answer of a reasoning model: cut off, shown while it is generated, removed from the history."""

import re
from typing import NamedTuple

from minillm.data.reasoning import TAGS
from minillm.terminal import DIM, RESET, use_colour

_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_UNDECIDED = re.compile(r"\s*(<[/a-z]{0,7})?\Z")  # white space that may end a block, and the beginning of a tag
NO_THOUGHTS = "<think>\n\n</think>"
_THINKING = re.compile(r"<think>.*?(</think>|(?=<answer>)|\Z)", re.DOTALL)


class Part(NamedTuple):
    """A text from one part of an answer: its thinking, or what is meant for the reader."""

    is_thinking: bool
    is_new: bool
    """Whether this is the first text after a tag, or after the beginning."""
    text: str
    """At least one character."""


class ThinkingSplitter:
    """Cuts the text of an answer, in pieces of any size, at its tags.

    The tags and the white space next to them are dropped; all other characters are kept.

    Args:
        opened: beginning of the answer that the prompt already contains. It tells whether the model is thinking; it is
            not returned.
    """

    def __init__(self, *, opened: str = ""):
        self._pending, self._is_thinking = "", False
        self._is_new, self._is_after_tag = True, False
        self.push(opened)

    def push(self, piece: str) -> list[Part]:
        """Return the parts of the text that are certain now."""
        *parts, text = _TAG.split(self._pending + piece)  # text, tag, ..., text, tag; text
        output = []
        for part in parts:
            if part in TAGS:
                self._is_thinking, self._is_new, self._is_after_tag = part == TAGS[0], True, True
            else:
                output += self._part(part.rstrip())
        end = _UNDECIDED.search(text).start()
        self._pending = text[end:]
        return output + self._part(text[:end])

    def finish(self) -> list[Part]:
        """Return the text that was held back; call it when no more text follows."""
        pending, self._pending = self._pending, ""
        return self._part(pending)

    def _part(self, text: str) -> list[Part]:
        text = text.lstrip() if self._is_after_tag else text
        if not text:
            return []
        part = Part(self._is_thinking, self._is_new, text)
        self._is_new = self._is_after_tag = False
        return [part]


class ThinkingView:
    """Turns the text of an answer, in pieces of any size, into the text to show.

    The tags and the white space around them are not shown; the answer begins on a new line after the thinking.

    Args:
        mode: "dim" shows the thinking dimmed (if the terminal has colours, else like "plain"), "plain" shows it like
            the answer, "hide" does not show it.
        opened: of the ``ThinkingSplitter``.
    """

    def __init__(self, mode: str, *, opened: str = ""):
        self.mode = "plain" if mode == "dim" and not use_colour() else mode
        self._splitter = ThinkingSplitter(opened=opened)
        self._has_output = False

    def push(self, piece: str) -> str:
        """Return the text to show now."""
        return "".join(map(self._styled, self._splitter.push(piece)))

    def finish(self) -> str:
        """Return the text that was held back; call it when no more text follows."""
        parts = self._splitter.finish()
        return "".join(self._styled(part._replace(text=part.text.rstrip())) for part in parts)

    def _styled(self, part: Part) -> str:
        text = part.text if self._has_output else part.text.lstrip()
        if not text or (part.is_thinking and self.mode == "hide"):
            return ""
        line_break = "\n" if part.is_new and self._has_output else ""
        self._has_output = True
        return line_break + (f"{DIM}{text}{RESET}" if part.is_thinking and self.mode == "dim" else text)


def without_thinking(text: str) -> str:
    """Return an answer with an empty think block: the same form, without the thoughts."""
    return _THINKING.sub(NO_THOUGHTS, text)


def mend_cut(text: str) -> str:
    """Return an answer that was cut, with its last block closed, and without a tool call that is not complete."""
    begin, tag, call = text.rpartition("<tool_call>")
    text = begin.rstrip() if tag and "</tool_call>" not in call else text
    last_tag = (_TAG.findall(text) or [""])[-1]
    return f"{text.rstrip()}\n{last_tag.replace('<', '</')}" if last_tag in (TAGS[0], TAGS[2]) else text
