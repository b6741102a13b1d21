"""Compares the suite scores of several models, question by question.

    python eval_model.py --from_weight out/full_sft_512 --suite all --output a.json
    python eval_model.py --from_weight out/rlhf_512     --suite all --output b.json
    python -m minillm.evaluation.compare_scores a.json b.json --output comparison.md

The first file is what the others are compared with. Two models that answer the same questions differ by less noise than
their separate intervals suggest: only the questions that one of them answers right tell anything. The p-value is that
of McNemar's exact test, the interval that of a paired bootstrap.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minillm.cli.command_line import parse, require, script
from minillm.errors import UserError
from minillm.evaluation.sample_answers import write_whole
from minillm.evaluation.statistics import paired_difference
from minillm.evaluation.suites.report import draw_radar


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Compare result files of eval_model.py --suite."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Two or more result files; the others are compared with the first."""
    output: str = ""
    """Also write the tables to this Markdown file."""
    picture: str = ""
    """Also draw the accuracies to this .png file."""

    def check(self) -> None:
        """Raise ``UserError`` if there is nothing to compare."""
        require(len(self.files) > 1, f"{len(self.files)} result file: give at least two to compare")
        for path in self.files:
            require(Path(path).is_file(), f"{path}: no such file; eval_model.py --suite ... --output writes one")


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(CompareArguments, argv)
    scores_of = {path: read_scores(path) for path in args.files}
    first, *others = args.files
    tables = [accuracy_table(scores_of)]
    tables += [difference_table(first, scores_of[first], other, scores_of[other]) for other in others]
    text = "\n\n".join(tables)
    print(text)
    if args.output:
        write_whole(Path(args.output), text + "\n")
    if args.picture:
        try:
            draw_radar(Path(args.picture), scores_of)
            print(f"wrote {args.picture}")
        except ImportError:
            raise UserError("--picture needs matplotlib: pip install matplotlib") from None


def read_scores(path: str) -> dict[str, dict]:
    """Return the suites of a result file by name.

    Raises:
        UserError: not a result file, or one without suites or without their questions.
    """
    try:
        suites = json.loads(Path(path).read_text(encoding="utf-8"))["suites"]
        for score in suites.values():
            _ = [(question["id"], question["correct"]) for question in score["questions"]]
            _ = [float(number) for number in (score["accuracy"], score["chance"], *score["interval"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no suites with questions in it ({error}); eval_model.py --suite writes them"
        ) from None
    if not suites:
        raise UserError(f"{path}: no suites in it; eval_model.py --suite writes them")
    return suites


def accuracy_table(scores_of: dict[str, dict[str, dict]]) -> str:
    """Return the accuracies of all models as Markdown, with intervals and chance."""
    names = list(dict.fromkeys(name for scores in scores_of.values() for name in scores))
    rows = [["suite", "chance", *scores_of]]
    for name in names:
        scores = [scores.get(name) for scores in scores_of.values()]
        chance = next(f"{score['chance']:.1%}" for score in scores if score)
        rows.append([name, chance, *("-" if score is None else _share(score) for score in scores)])
    return _markdown(rows)


def difference_table(first_path: str, first: dict[str, dict], other_path: str, other: dict[str, dict]) -> str:
    """Return the differences of two models on the questions that both have, suite by suite and together, as Markdown.

    Raises:
        UserError: no suite in common, or one that was asked in different ways or has no questions in common.
    """
    names = [name for name in first if name in other]
    if not names:
        raise UserError(f"{first_path} has {', '.join(first)}, {other_path} {', '.join(other)}: no suite in common")
    rows = [["suite", "questions", "difference", "95 % interval", "only first", "only second", "p (McNemar)"]]
    together: tuple[list[bool], list[bool]] = ([], [])
    for name in names:
        for key in ("style", "n_shot"):
            if first[name].get(key) != other[name].get(key):
                values = f"{first[name].get(key)!r} and {other[name].get(key)!r}"
                raise UserError(f"{name}: {key} is {values} in {first_path} and {other_path}: measure both alike")
        pairs = _paired(first[name], other[name])
        if not pairs:
            raise UserError(f"{name}: {first_path} and {other_path} have no question in common: measure both alike")
        for side, correct in zip(together, zip(*pairs, strict=True), strict=True):
            side += correct
        rows.append([name, *_difference(*zip(*pairs, strict=True))])
    if len(names) > 1:
        rows.append(["all questions", *_difference(*together)])
    return f"{other_path} minus {first_path}:\n\n{_markdown(rows)}"


def _paired(first: dict, other: dict) -> list[tuple[bool, bool]]:
    correct_of = {question["id"]: question["correct"] for question in other["questions"]}
    return [(q["correct"], correct_of[q["id"]]) for q in first["questions"] if q["id"] in correct_of]


def _difference(first, second) -> list[str]:
    result = paired_difference(first, second)
    interval = f"{result.low:+.1%} to {result.high:+.1%}"
    counts = [f"{result.only_first:,}", f"{result.only_second:,}", f"{result.p_value:.2g}"]
    return [f"{len(first):,}", f"{result.difference:+.1%}", interval, *counts]


def _share(score: dict) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    ruler = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]])


if __name__ == "__main__":
    main()
