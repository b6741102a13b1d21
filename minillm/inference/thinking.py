"""Shows the answer of a reasoning model while it is generated, and removes its thinking from the history."""

import re

from minillm.data.reasoning import TAGS
from minillm.terminal import DIM, RESET, use_colour

_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_UNDECIDED = re.compile(r"\s*(<[/a-z]{0,7})?\Z")  # white space that may end a block, and the beginning of a tag
NO_THOUGHTS = "<think>\n\n</think>"
_THINKING = re.compile(r"<think>.*?(</think>|(?=<answer>)|\Z)", re.DOTALL)


class ThinkingView:
    """Turns the text of an answer, in pieces of any size, into the text to show.

    The tags and the white space around them are not shown; the answer begins on a new line after the thinking.

    Args:
        mode: "dim" shows the thinking dimmed (if the terminal has colours, else like "plain"), "plain" shows it like
            the answer, "hide" does not show it.
        opened: beginning of the answer that the prompt already contains. It tells whether the model is thinking; it is
            not shown.
    """

    def __init__(self, mode: str, *, opened: str = ""):
        self.mode = "plain" if mode == "dim" and not use_colour() else mode
        self._pending, self._is_thinking = "", False
        self._is_new_part, self._has_output = True, False
        self.push(opened)
        self._has_output = False

    def push(self, piece: str) -> str:
        """Return the text to show now."""
        *parts, text = _TAG.split(self._pending + piece)  # text, tag, ..., text, tag; text
        output = ""
        for part in parts:
            if part in TAGS:
                self._is_thinking, self._is_new_part = part == TAGS[0], True
            else:
                output += self._styled(part.rstrip())
        end = _UNDECIDED.search(text).start()
        self._pending = text[end:]
        return output + self._styled(text[:end])

    def finish(self) -> str:
        """Return the text that was held back; call it when no more text follows."""
        pending, self._pending = self._pending, ""
        return self._styled(pending.rstrip())

    def _styled(self, text: str) -> str:
        text = text.lstrip() if self._is_new_part else text
        if not text or (self._is_thinking and self.mode == "hide"):
            return ""
        line_break = "\n" if self._is_new_part and self._has_output else ""
        self._is_new_part, self._has_output = False, True
        return line_break + (f"{DIM}{text}{RESET}" if self._is_thinking and self.mode == "dim" else text)


def without_thinking(text: str) -> str:
    """Return an answer with an empty think block: the same form, without the thoughts."""
    return _THINKING.sub(NO_THOUGHTS, text)


def mend_cut(text: str) -> str:
    """Return an answer that was cut, with its last block closed, and without a tool call that is not complete."""
    begin, tag, call = text.rpartition("<tool_call>")
    text = begin.rstrip() if tag and "</tool_call>" not in call else text
    last_tag = (_TAG.findall(text) or [""])[-1]
    return f"{text.rstrip()}\n{last_tag.replace('<', '</')}" if last_tag in (TAGS[0], TAGS[2]) else text
