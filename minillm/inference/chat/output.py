"""What a chat prints: an answer while it is generated, and the line about its speed."""

import re
import time
from collections.abc import Generator
from dataclasses import dataclass

from minillm.inference.generate import Completion
from minillm.inference.thinking import ThinkingView
from minillm.terminal import ERASE_LINE, dim, use_colour

# A model of bytes may choose any of them: a terminal would obey some, and move the cursor or change its colours.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, kw_only=True)
class ShownAnswer:
    """An answer after it was shown."""

    text: str
    """All of it, with the thinking that was not shown."""
    completion: Completion | None
    """None: Ctrl-C stopped it."""
    seconds: float
    first_seconds: float
    """Seconds until the first text, or until the end without any."""


def show_answer(pieces: Generator[str, None, Completion], view: ThinkingView | None) -> ShownAnswer:
    """Print the pieces of an answer as they arrive, and return it. Ctrl-C ends it; what was said is returned."""
    texts: list[str] = []
    start = time.perf_counter()
    first_seconds, completion = None, None
    hides = view is not None and view.mode == "hide" and use_colour()
    is_waiting = False  # a note stands where the answer will begin
    try:
        while completion is None:
            try:
                texts.append(next(pieces))
            except StopIteration as end:
                completion = end.value
                break
            if first_seconds is None:
                first_seconds = time.perf_counter() - start
            piece = _CONTROL.sub("\ufffd", texts[-1])
            piece = view.push(piece) if view else piece
            if piece:
                piece = ERASE_LINE + piece if is_waiting else piece
                hides = is_waiting = False
            elif hides and not is_waiting:
                piece, is_waiting = dim("thinking…"), True
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    seconds = time.perf_counter() - start
    print((ERASE_LINE if is_waiting else "") + (view.finish() if view else ""))
    return ShownAnswer(
        text="".join(texts).replace("\0", ""),  # a byte that a model may choose, but that no text may have
        completion=completion,
        seconds=seconds,
        first_seconds=seconds if first_seconds is None else first_seconds,
    )


def speed(n_tokens: int, seconds: float, *, first_seconds: float | None = None) -> str:
    """Return a line with the number of tokens, the time and the rate, and with the time to the first token if given."""
    first = "" if first_seconds is None else f", first after {1000 * first_seconds:,.0f} ms"
    return f"[{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / max(seconds, 1e-9):,.0f} tokens/s{first}]"
