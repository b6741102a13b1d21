"""Decodes a growing list of token ids: only complete characters, and never a part of a stop string."""

import codecs

from minillm.errors import UserError


class TextDecoder:
    """Turn ids into text one at a time. A character of several tokens appears with its last byte.

    Special tokens give no text, nor do ids beyond the vocabulary, which a model with padded embeddings may choose.
    Bytes that can never become a character give U+FFFD, as in ``tokenizer.decode(..., skip_special_tokens=True)``. A
    character that is incomplete at the end gives no text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the characters that ``token`` completes; there may be none."""
        is_text = token < self.tokenizer.vocab_size and token not in self.tokenizer.special_ids
        piece = self.tokenizer.token_bytes(token) if is_text else b""
        return self._utf8.decode(piece)


class StopMatcher:
    """Pass text on up to the first stop string, but hold back an end that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop = stop
        self.stopped = False
        self._pending = ""  # the end that is held back

    def push(self, piece: str) -> str:
        """Return the text that is certain now; ``self.stopped`` is True after a complete stop string."""
        text = self._pending + piece
        stop_positions = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if stop_positions:
            self.stopped, self._pending = True, ""
            return text[: min(stop_positions)]
        n_pending = max((n_matched(text, stop) for stop in self.stop), default=0)
        self._pending = text[len(text) - n_pending :]
        return text[: len(text) - n_pending]

    def finish(self) -> str:
        """Return the text that was held back; call it when no more text follows."""
        pending, self._pending = self._pending, ""
        return pending


def n_matched(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is the beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: str | list[str] | tuple[str, ...], tokenizer) -> tuple[str, ...]:
    """Return the stop strings as a tuple; ``stop`` may be a single string.

    Raises:
        UserError: an empty stop string (it would end every answer at once), or no tokenizer to decode text.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stop):
        raise UserError(f"stop {list(stop)!r}: stop strings must be texts of at least one character")
    if stop and tokenizer is None:
        raise UserError(f"stop {list(stop)!r}: stop strings are matched in decoded text: also pass tokenizer=")
    return stop
