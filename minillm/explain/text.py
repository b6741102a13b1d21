"""The explanation for a terminal."""

import math
import unicodedata

from minillm.explain.trace import Part, Trace
from minillm.explain.words import WORDS
from minillm.terminal import BOLD, RESET, use_colour

COLUMNS = ("part", "shape", "parameters", "flops", "bytes", "time", "norm", "guess")
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def as_text(trace: Trace, tokenizer, config, language: str) -> str:
    """Return the explanation as lines."""
    words = WORDS[language]
    lines = [_heading(words["tokens"]), *_token_lines(trace, tokenizer)]
    lines += ["", _heading(words["way"])]
    rows = [[words[name] for name in COLUMNS]] + [row(part, tokenizer, words) for part in trace.parts]
    lines += table([*rows, total_row(trace, words)])
    lines += ["", _heading(words["next"]), next_note(trace, config, words)]
    for token, probability in trace.candidates:
        lines.append(f"{probability:7.2%}  {'█' * round(40 * probability):<40}  {shown(tokenizer, token)}")
    return "\n".join(lines)


def row(part: Part, tokenizer, words: dict[str, str]) -> list[str]:
    """Return the cells of a part's row."""
    came, went = ("x".join(map(str, shape)) for shape in part.shapes)
    guess = "" if part.guess is None else f"{shown(tokenizer, part.guess[0])} {part.guess[1]:.0%}"
    length = "" if part.stream_norms is None else f"{float(part.stream_norms.mean()):.2f}"
    return [
        part_name(part, words), f"{came} → {went}", number(part.n_parameters), number(part.flops), number(part.n_bytes),
        f"{part.seconds * 1e3:.2f} ms", length, guess,
    ]  # fmt: skip


def total_row(trace: Trace, words: dict[str, str]) -> list[str]:
    """Return the cells of the row with the sums."""
    sums = [number(trace.total(name)) for name in ("n_parameters", "flops", "n_bytes")]
    return [words["total"], "", *sums, f"{trace.total('seconds') * 1e3:.2f} ms", "", ""]


def next_note(trace: Trace, config, words: dict[str, str]) -> str:
    """Return what is said above the most probable next tokens."""
    return words["next_note"].format(
        vocabulary=f"{config.vocab_size:,}", entropy=trace.entropy, choices=math.exp(trace.entropy)
    )


def part_name(part: Part, words: dict[str, str]) -> str:
    """Return what a part is called on the page: its layer and its kind."""
    kind = words["norm_part" if part.kind == "norm" else part.kind]
    numbers = [word for word in part.name.split(".") if word.isdecimal()]
    return f"{words['layer']} {numbers[0]} {kind}" if numbers else kind


def shown(tokenizer, token: int) -> str:
    """Return a token as text in which white space can be seen."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    text = tokenizer.decode([token])
    return text.replace(" ", "␣").replace("\n", "⏎") or f"<{token}>"


def number(value: float) -> str:
    """Return a count with three digits and a unit."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def table(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines; Chinese characters are two columns wide."""
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell + " " * (size - width(cell)) for cell, size in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def width(text: str) -> int:
    """Return the columns that a text takes in a terminal."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _token_lines(trace: Trace, tokenizer) -> list[str]:
    lines, line = [], ""
    for token in trace.ids:
        piece = f"[{shown(tokenizer, token)}|{token}] "
        if width(line + piece) > 100:
            lines.append(line.rstrip())
            line = ""
        line += piece
    return [*lines, line.rstrip()]


def _heading(text: str) -> str:
    return f"{BOLD}{text}{RESET}" if use_colour() else text
