"""The scores of suites as a table of text, as Markdown and as a picture.

Every score stands with its 95 % interval and with chance; many differences are smaller than the interval.
"""

import math
from pathlib import Path

from minillm.errors import UserError
from minillm.files import atomic_file

_HEADS = ("suite", "questions", "accuracy", "95 % interval", "by subject", "per byte", "chance", "untrained", "seconds")
_WIDTHS = (16, 9, 8, 15, 10, 8, 7, 9, 8)


def cells(name: str, score: dict) -> list[str]:
    """Return a suite's row: its name and figures as text; ``-`` where a figure does not apply."""
    low, high = score["interval"]
    per_byte = score["accuracy_normalized"] if score["style"] == "texts" else None
    return [
        name,
        f"{score['n']:,}",
        f"{score['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{score['subject_average']:.1%}",
        _percent(per_byte),
        f"{score['chance']:.1%}",
        _percent(score.get("random", {}).get("accuracy")),
        f"{score['seconds']:.1f}",
    ]


def line(name: str = "", score: dict | None = None) -> str:
    """Return a row of the printed table, or its head without a score."""
    texts = _HEADS if score is None else cells(name, score)
    first, *others = zip(texts, _WIDTHS, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)])


def markdown(title: str, scores: dict[str, dict]) -> str:
    """Return a Markdown page with the table of scores by the suites' titles."""
    rows = [list(_HEADS), ["---"] + ["---:"] * (len(_HEADS) - 1), *(cells(*item) for item in scores.items())]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"# {title}\n\n{table}\n\n{describe(scores)}\n"


def describe(scores: dict[str, dict]) -> str:
    """Return what is worth knowing about the scores: which do not differ from chance, and cut prompts."""
    at_chance = [name for name, score in scores.items() if score["interval"][0] <= score["chance"] > 0]
    cut = [f"{name} {score['n_truncated']:,}" for name, score in scores.items() if score["n_truncated"]]
    texts = []
    if at_chance:
        texts.append(f"Not better than chance, as far as the interval tells: {', '.join(at_chance)}.")
    if cut:
        texts.append(f"Prompts that were too long and lost their beginning: {', '.join(cut)}.")
    return "\n".join(texts)


def draw_radar(path: Path, scores_of: dict[str, dict[str, dict]]) -> None:
    """Draw the accuracies of one or several models by suite, with chance; bars if they have fewer than three suites.

    Args:
        scores_of: by the model's label, then by the suite's name.

    Raises:
        ImportError: matplotlib is not installed.
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for scores in scores_of.values() for name in scores))
    chance = {name: next(s[name]["chance"] for s in scores_of.values() if name in s) for name in names}
    lines = {label: {n: score["accuracy"] for n, score in scores.items()} for label, scores in scores_of.items()}
    for label, scores in scores_of.items():
        if any("random" in score for score in scores.values()):
            lines[f"{label}, untrained"] = {n: s["random"]["accuracy"] for n, s in scores.items() if "random" in s}
    lines["chance"] = chance
    is_radar = len(names) > 2
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot(projection="polar" if is_radar else None)
    for number, (label, shares) in enumerate(lines.items()):
        style = {"color": "grey", "linestyle": "--"} if label == "chance" else {}
        values = [shares.get(name, math.nan) for name in names]
        if is_radar:
            angles = [2 * math.pi * n / len(names) for n in range(len(names))]
            axes.plot([*angles, 0], [*values, values[0]], label=label, **style)
        else:
            width = 0.8 / len(lines)
            axes.bar(
                [n + number * width for n in range(len(names))], values, width, label=label, color=style.get("color")
            )
    ticks = [2 * math.pi * n / len(names) if is_radar else n + 0.4 - 0.4 / len(lines) for n in range(len(names))]
    axes.set_xticks(ticks, names)
    axes.set_ylim(0, max(0.5, *(value for shares in lines.values() for value in shares.values())))
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.legend(loc="outside lower center", ncols=2)
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
