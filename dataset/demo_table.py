"""Prints the results of the demo as one table: ``python dataset/demo_table.py [--save_dir out/demo]``

Each line is a figure of one stage, before and after it. Figures that do not exist yet are left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [p for p in (str(HERE.parent),) if p not in sys.path]

from minillm.cli.command_line import parse, script  # noqa: E402
from minillm.errors import UserError  # noqa: E402
from minillm.reports.tracking import read_metrics  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Print the table of a demo's stages."""

    save_dir: str = "out/demo"
    """Directory of the demo's runs, with the folder results that eval_model.py writes."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of one stage: a share between 0 and 1, or a loss in nats per token; None where it is not known."""

    stage: str
    metric: str
    before: float | None
    after: float | None
    is_share: bool = True

    def cells(self) -> list[str]:
        """Return the cells of the line as text."""
        figures = ("-" if x is None else f"{x:.1%}" if self.is_share else f"{x:.3f}" for x in (self.before, self.after))
        return [self.stage, self.metric, *figures]


def lines_of(save_dir: str | Path) -> Iterator[Line]:
    """Yield the lines of all stages that have figures."""
    return (line for line in all_lines(save_dir) if line.after is not None)


def read_result(save_dir: str | Path, name: str, *keys: str):
    """Return what is under ``keys`` in a result file of eval_model.py; None if the file or a key is missing."""
    path = Path(save_dir) / "results" / f"{name}.json"
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    for key in keys:
        value = None if value is None else value.get(key)
    return value


def all_lines(save_dir: str | Path) -> Iterator[Line]:
    """Yield the lines of all stages, also of those that have no figures yet."""
    root, result = Path(save_dir), partial(read_result, save_dir)

    def gap(run: str) -> float | None:
        """Return the last validation loss minus the entropy of the texts."""
        rows = [row for row in read_metrics(root / run / "metrics.jsonl") if "floor" in row]
        return rows[-1]["loss"] - rows[-1]["floor"] if rows else None

    def tasks(name: str) -> float | None:
        return result(name, "exact_match", "task_average")

    rows = [row for row in read_metrics(root / "pretrain_128" / "metrics.jsonl") if "floor" in row]
    config = root / "pretrain_128" / "config.json"
    is_known = bool(rows) and config.is_file()
    gap_of_guessing = math.log(json.loads(config.read_text())["vocab_size"]) - rows[-1]["floor"] if is_known else None
    identity, calls = ("exact_match", "accuracy"), ("tool_calls", "task_average")
    figures = [
        ("pretrain", "nats/token above the floor (before: guessing)", gap_of_guessing, gap("pretrain_128"), False),
        ("full_sft", "tasks, exact match", tasks("pretrain"), tasks("full_sft")),
        ("lora", "who it is, exact match", result("full_sft_identity_test", *identity),
         result("identity_identity_test", *identity)),
        ("lora", "tasks, exact match", tasks("full_sft"), tasks("identity_sft_test")),
        ("dpo", "chosen reply more probable", result("full_sft", "preference", "accuracy"),
         result("rlhf", "preference", "accuracy")),
        ("dpo", "free answers like the chosen reply", result("full_sft", "preference", "like_chosen"),
         result("rlhf", "preference", "like_chosen")),
        ("dpo", "tasks, exact match", tasks("full_sft"), tasks("rlhf")),
        ("distill", "student, nats/token above the floor (before: hard labels)", gap("pretrain_64"), gap("distill_64"),
         False),
        ("reason", "problems, exact match (before: trained to answer at once)",
         result("direct", "reasoning", "thinking", "accuracy"), result("reason", "reasoning", "thinking", "accuracy")),
        ("reason", "answers that have the form", None, result("reason", "reasoning", "thinking", "format_adherence")),
        ("reason", "tasks, exact match", tasks("rlhf"), tasks("reason_sft_test")),
        ("tools", "calls, exact match", result("full_sft_tools_test", *calls), result("tools_tools_test", *calls)),
        ("tools", "answers after calls, exact match", tasks("full_sft_tools_test"), tasks("tools_tools_test")),
        ("tools", "tasks, exact match", tasks("full_sft"), tasks("tools_sft_test")),
    ]  # fmt: skip
    for stage, metric, before, after, *is_share in figures:
        yield Line(stage=stage, metric=metric, before=before, after=after, is_share=not is_share)


def table(lines: list[Line]) -> str:
    """Return the lines as a table for a terminal."""
    cells = [["stage", "metric", "before", "after"], *(line.cells() for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}" for row in cells
    )


@script
def main(argv: list[str] | None = None) -> list[Line]:
    args = parse(Arguments, argv)
    lines = list(lines_of(args.save_dir))
    if not lines:
        raise UserError(f"--save_dir {args.save_dir}: no figures there; make demo writes them")
    print(table(lines))
    return lines


if __name__ == "__main__":
    main()
