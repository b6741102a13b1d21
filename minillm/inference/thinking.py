"""What is shown of a reasoned answer while it is written, and what is kept of it for the next question."""

import re

from minillm.data.reasoning import TAGS
from minillm.terminal import DIM, RESET, use_colour

_TAG = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")
_UNDECIDED = re.compile(r"\s*(<[/a-z]{0,7})?\Z")  # blanks that may end a block, and the beginning of a tag
_THINKING = re.compile(r"<think>.*?(</think>|(?=<answer>)|\Z)", re.DOTALL)


class ThinkingView:
    """Turns the text of a reasoned answer into what is shown of it, piece by piece, however it is cut.

    The tags and the blanks around them are not shown; where one part follows another, it begins a new line.

    Args:
        mode: "dim" shows the thinking dimmed where the output has colours, else as it is, which is "plain"; "hide"
            leaves it out.
        opened: what the prompt has already of the answer; it decides whether thinking goes on, and is not shown.
    """

    def __init__(self, mode: str, *, opened: str = ""):
        self.mode = "plain" if mode == "dim" and not use_colour() else mode
        self._held, self._thinks = "", False
        self._begins, self._shown = True, False  # the next text begins a part; some was shown before
        self.push(opened)
        self._shown = False

    def push(self, piece: str) -> str:
        """Return what is to be shown now."""
        *parts, text = _TAG.split(self._held + piece)  # text, tag, ..., text, tag; text
        shown = ""
        for part in parts:
            if part in TAGS:
                self._thinks, self._begins = part == TAGS[0], True
            else:
                shown += self._show(part.rstrip())
        end = _UNDECIDED.search(text).start()
        self._held = text[end:]
        return shown + self._show(text[:end])

    def finish(self) -> str:
        """Return what was held back, once no more text can come."""
        held, self._held = self._held, ""
        return self._show(held.rstrip())

    def _show(self, text: str) -> str:
        text = text.lstrip() if self._begins else text
        if not text or (self._thinks and self.mode == "hide"):
            return ""
        line = "\n" if self._begins and self._shown else ""
        self._begins, self._shown = False, True
        return line + (f"{DIM}{text}{RESET}" if self._thinks and self.mode == "dim" else text)


def without_thinking(text: str) -> str:
    """Return a reasoned answer with its thinking emptied: the form that was learned, without what led to the answer.

    DeepSeek-R1 (2025) and its successors are given earlier answers without their thoughts too.
    """
    return _THINKING.sub("<think>\n\n</think>", text)
