"""Shows runs next to each other, or lists all runs below a directory.

    python -m minillm.compare out                                  an index of all runs: out/index.html
    python -m minillm.compare out/pretrain_512 out/pretrain_768    their curves and what differs: out/compare.html

The pages are single files that need nothing else, and can be read on a phone.
"""

import os
from html import escape
from pathlib import Path
from typing import Literal

import tyro

from minillm.compare.curves import X_NAMES, draw_runs, small_curve, words
from minillm.compare.runs import NONE, RunRecord, differences, is_run, read_runs, runs_of, unique_names
from minillm.errors import UserError, script
from minillm.files import replace_text
from minillm.reports import page

TABS = (
    "<style>.tab{display:none}input[name=x]{margin:0 .4em 0 0}label{margin-right:1.5em}"
    + "".join(f"#by_{x}:checked~.{x}{{display:block}}" for x in X_NAMES)
    + "</style>"
)


def compare(
    runs: tyro.conf.Positional[tuple[str, ...]] = ("out",),
    *,
    output: str = "",
    x: Literal["step", "tokens", "seconds"] = "step",
) -> None:
    """Show runs next to each other, or list all runs below a directory.

    Args:
        runs: run directories; or a directory that holds runs, to list them all.
        output: directory of the pages (default: the one that holds all the runs).
        x: what the curves of compare.png are drawn over; the page has all three.
    """
    given = list(runs) or ["out"]
    paths = runs_of(given)
    is_index = len(given) == 1 and not is_run(Path(given[0]))
    if is_index:
        parent = Path(given[0])
        records = read_runs(paths, [path.relative_to(parent).as_posix() for path in paths])
    else:
        parent = Path(os.path.commonpath([path.resolve().parent for path in paths]))
        records = read_runs(paths, unique_names(paths))
    folder = Path(output) if output else parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = _write_index(records, folder) if is_index else _write_comparison(records, folder, x=x)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
    print(_as_lines(records))
    for path in written:
        print(f"saved {path}")
    if is_index:
        print("to compare some of them: python -m minillm.compare RUN RUN ...")


def _write_index(records: list[RunRecord], folder: Path) -> list[Path]:
    """Write the page that lists runs."""
    rows = []
    for run in records:
        results = run.results()
        name, summary = escape(run.name), run.path / "summary.html"
        if summary.is_file():
            name = f'<a href="{escape(os.path.relpath(summary, folder), quote=True)}">{name}</a>'
        rows.append([name, small_curve(run), *map(escape, results.values())])
    head = ["run", "loss", *records[0].results()]
    text = page.page(
        f"Runs in {folder.resolve().name}",
        page.wide_table(head, rows),
        page.note("Small curves: training loss in blue, validation loss in red. A name leads to the run's own page."),
    )
    return [_write(folder / "index.html", text)]


def _write_comparison(records: list[RunRecord], folder: Path, *, x: str) -> list[Path]:
    """Write the page and the picture of some runs."""
    empty = [str(run.path) for run in records if not run.rows]
    if empty:
        raise UserError(
            f"{', '.join(empty)}: metrics.jsonl has no row; a run writes one every --log_interval steps, so this one "
            "ended before, or the file is damaged"
        )
    names = [escape(run.name) for run in records]
    results = [run.results() for run in records]
    shared, others = differences(records)
    for run in records:
        if not run.settings:
            print(f"{run.path}: no readable run.yaml, so its settings are unknown")
    parts = [_curves(records, folder, first=x), "<h2>Results</h2>"]
    parts.append(page.wide_table(["", *names], _lines({key: [each[key] for each in results] for key in results[0]})))
    figures = dict.fromkeys(key for run in records for key in run.figures)
    if figures:
        last = {words(key): [_figure(run.last("valid", key)) for run in records] for key in figures}
        parts += ["<h2>Last validation</h2>", page.wide_table(["", *names], _lines(last))]
    parts.append("<h2>Settings that differ</h2>")
    parts.append(page.wide_table(["", *names], _lines(shared)) if shared else "<p>none</p>")
    if others:
        table = page.wide_table(["", *names], _lines(others))
        parts.append(f"<details><summary>Settings that only some of the runs have</summary>{table}</details>")
    written = [_write(folder / "compare.html", page.page("Runs compared", *parts))]
    return written + [path for path in [folder / "compare.png"] if path.is_file()]


def _curves(records: list[RunRecord], folder: Path, *, first: str) -> str:
    """Draw the curves over step, tokens and seconds; ``compare.png`` keeps those over ``first``."""
    tabs, blocks, picture = "", "", folder / "compare.png"
    try:
        for x in sorted(X_NAMES, key=lambda name: name == first):  # the last one stays
            panels = draw_runs(records, picture, x=x)
            blocks += f'<div class="tab {x}">{page.pictures(panels, alt=f"curves by {X_NAMES[x]}")}</div>'
    except ImportError:
        print("no curves: drawing needs matplotlib: pip install matplotlib")
        return page.no_picture()
    for x, name in X_NAMES.items():
        checked = " checked" if x == first else ""
        tabs += f'<input type="radio" name="x" id="by_{x}"{checked}><label for="by_{x}">by {name}</label>'
    return f"{TABS}<div>{tabs}{blocks}</div>"


def _lines(table: dict[str, list[str]]) -> list[list[str]]:
    return [[f"<b>{escape(name)}</b>", *map(escape, texts)] for name, texts in table.items()]


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _write(path: Path, text: str) -> Path:
    replace_text(path, text)
    return path


def _as_lines(records: list[RunRecord]) -> str:
    """Return a table of names and results for the terminal."""
    keys = ("stage", "steps", "training loss", "validation loss", "lowest loss", "nats per")
    results_of = {run.name: run.results() for run in records}
    table = [["run", *keys], *([name, *(results[key] for key in keys)] for name, results in results_of.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


@script
def main(argv: list[str] | None = None) -> None:
    """Run the command; a ``UserError`` becomes one line on standard error and exit code 2."""
    tyro.cli(compare, args=argv, prog="python -m minillm.compare", use_underscores=True)


if __name__ == "__main__":
    main()
