"""From token ids to text while it grows: whole characters only, and never a part of a stop string."""

import codecs

from minillm.errors import UserError


class TextDecoder:
    """Turn ids into text one at a time; a character split over several tokens appears with its last byte.

    Special tokens that ``tokenizer.decode(..., skip_special_tokens=True)`` leaves out are left out here
    too. Bytes that can never become a character turn into U+FFFD, as in that function; a character still
    unfinished when the ids end is not printed.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text that ``token`` completes; it may be empty."""
        piece = b"" if token in self.tokenizer.special_ids else self.tokenizer.token_bytes(token)
        return self._utf8.decode(piece)


class StopMatcher:
    """Let text through up to the first stop string, holding back what may still turn out to begin one."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that is now certain; ``self.stopped`` tells whether a stop string was completed."""
        text = self._held + piece
        found = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_n_begun(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """Return what was held back, once no more text can come."""
        held, self._held = self._held, ""
        return held


def _n_begun(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: str | list[str] | tuple[str, ...], tokenizer) -> tuple[str, ...]:
    """Return the stop strings as a tuple; one string alone is accepted.

    Raises:
        UserError: an empty stop string (it would end everything at once), or no tokenizer to read text with.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise UserError(f"stop {list(stop)!r}: stop strings must be texts of at least one character")
    if stop and tokenizer is None:
        raise UserError(f"stop {list(stop)!r}: stop strings are found in decoded text: pass tokenizer= too")
    return stop
