"""What a run leaves for people: ``run.yaml``, ``summary.png``, ``summary.html`` and the model card ``README.md``."""

import base64
import html
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import minillm
from minillm.checkpoints.lock import writable
from minillm.model.router_stats import relative_entropy
from minillm.reports.tracking import read_metrics


@dataclass(frozen=True)
class Section:
    """A table of a run's page, with a sentence above it and perhaps a picture.

    Attributes:
        rows: of cells; the first one is the head. picture: left out if there is no such file.
    """

    title: str
    text: str
    rows: list[list[str]]
    picture: Path | None = None


def write_run_file(directory: Path, content: dict) -> None:
    """Write ``run.yaml``: ``content``, the versions of the software, and the git revision."""
    versions = {"minillm": minillm.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    content = _plain(content) | {"versions": versions, "git_revision": git_revision()}
    temporary = directory / "run.yaml.tmp"
    with writable(directory):
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        os.replace(temporary, directory / "run.yaml")


def write_summary(
    directory: Path,
    facts: dict[str, str],
    samples: list[tuple[str, str]],
    *,
    unit: str,
    stage: str,
    tags: str,
    usage: str,
    report: Callable[[str], None],
    sections: Sequence[Section] = (),
) -> None:
    """Write the picture, the page and the model card of a finished run.

    Without matplotlib the page has no picture and says how to get one; nothing else is lost.

    Args:
        facts: rows of the page's table. samples: pairs (prompt, text). unit: what the loss counts.
        stage, tags, usage: of the model card. report: prints a line. sections: of the page, after the table.
    """
    rows = read_metrics(directory / "metrics.jsonl")
    picture = directory / "summary.png"
    with writable(directory):
        try:
            draw_curves(rows, picture, title=directory.name, unit=unit)
        except ImportError:
            picture = None
            report("no summary.png: drawing needs matplotlib: pip install matplotlib")
        page = _page(directory.name, facts, samples, picture, sections)
        head = f"---\n{tags}\n---\n\n# {directory.name}\n\nTrained with minillm, stage `{stage}`. {usage}\n\n"
        (directory / "summary.html").write_text(page, encoding="utf-8")
        (directory / "README.md").write_text(head + _model_card(facts, samples, picture), encoding="utf-8")


def draw_curves(rows: list[dict], path: Path, *, title: str, unit: str = "token") -> None:
    """Draw loss (training, validation, entropy floor), learning rate and gradient norm against the step.

    Rows of a mixture of experts add two pictures below: how busy each sparse layer's busiest expert is, in units of
    its fair share (1: all alike), and the entropy of the load in units of ln E (1: all alike). Rows of preference
    tuning add its figures below.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    loads = [(row["step"], row["expert_share"]) for row in train if row.get("expert_share")]
    is_preference = any("accuracy" in row for row in rows)
    figure = plt.figure(figsize=(14, 4 + 4 * bool(loads) + 4 * is_preference))
    grid = figure.add_gridspec(1 + bool(loads) + is_preference, 4)
    loss_axis, lr_axis, norm_axis = (figure.add_subplot(grid[0, columns]) for columns in (slice(2), 2, 3))
    loss_axis.plot([r["step"] for r in train], [r["loss"] for r in train], color="#7fa7d6", label="training")
    if valid:
        steps, losses = [r["step"] for r in valid], [r["loss"] for r in valid]
        loss_axis.plot(steps, losses, "o-", color="#b3402a", label="validation")
        floor = valid[-1].get("floor")
        if floor is not None:
            loss_axis.axhline(floor, color="#3b7d3b", linestyle="--", label=f"entropy floor {floor:.3f}")
    loss_axis.set(title=f"{title}: loss", xlabel="step", ylabel=f"nats per {unit}")
    losses = [row["loss"] for row in rows if row["loss"]]
    if losses and max(losses) > 3 * min(losses) > 0:  # or the first steps would flatten all that follows
        loss_axis.set_yscale("log")
        loss_axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss_axis.yaxis.set_minor_locator(NullLocator())
        loss_axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if loss_axis.get_legend_handles_labels()[1]:
        loss_axis.legend()
    lr_axis.plot([r["step"] for r in train], [r["lr"] for r in train], color="#555555")
    lr_axis.set(title="learning rate", xlabel="step")
    lr_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm_axis.plot([r["step"] for r in train], [r["grad_norm"] for r in train], color="#8a5a9e")
    norm_axis.set(title="gradient norm (before clipping)", xlabel="step")
    if loads:
        _draw_loads(figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:]), loads)
    if is_preference:
        _draw_preference([figure.add_subplot(grid[-1, column]) for column in range(4)], train, valid)
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_loads(busiest_axis, entropy_axis, loads: list[tuple[int, list[list[float]]]]) -> None:
    """Draw one curve per sparse layer, from (step, its share of tokens per layer and expert)."""
    steps, n_layers = [step for step, _ in loads], len(loads[-1][1])
    for index in range(n_layers):
        layers = [layers[index] for _, layers in loads]
        style = {"color": (0.2, 0.35 + 0.5 * index / n_layers, 0.8 - 0.6 * index / n_layers), "linewidth": 1}
        busiest_axis.plot(steps, [max(shares) * len(shares) for shares in layers], label=f"layer {index}", **style)
        entropy_axis.plot(steps, [relative_entropy(shares) for shares in layers], label=f"layer {index}", **style)
    busiest_axis.set(title="load of each layer's busiest expert", xlabel="step", ylabel="times its fair share")
    entropy_axis.set(title="entropy of the load of the experts", xlabel="step", ylabel="of ln E")
    busiest_axis.legend(fontsize="small", ncols=2, title="sparse layers, from below")


def _draw_preference(axes: list, train: list[dict], valid: list[dict]) -> None:
    """Draw what preference tuning writes down: lines are training, dots validation."""
    panels = (
        ("share of replies on the right side", ("accuracy",)),
        ("rewards", ("reward_chosen", "reward_rejected", "reward_good", "reward_bad")),
        ("log-probability of a reply, nats", ("log_prob_chosen", "log_prob_rejected", "log_prob_good", "log_prob_bad")),
        ("distance from the reference, nats", ("kl",)),
    )
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            color = "#b3402a" if name.endswith(("rejected", "bad")) else "#2f5fa8"
            for rows, style in ((train, "-"), (valid, "o")):
                points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=color, label=name if style == "-" else None)
        axis.set(title=title, xlabel="step")
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize="small")


def git_revision() -> str | None:
    """Return the revision of the code's own checkout, or None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _page(
    title: str,
    facts: dict[str, str],
    samples: list[tuple[str, str]],
    picture: Path | None,
    sections: Sequence[Section],
) -> str:
    escape = html.escape
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    texts = "".join(f"<div><b>{escape(a)}</b><pre>{escape(b)}</pre></div>" for a, b in samples)
    image = "<p>No picture: <code>pip install matplotlib</code></p>"
    if picture is not None:
        image = _image(picture)
    more = "".join(map(_section, sections))
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
        "img{max-width:100%}th{text-align:left;padding-right:2em;font-weight:600;vertical-align:top}"
        ".figures td,.figures th{text-align:right;padding:0 .8em 0 0}"
        "pre{background:#f5f5f2;padding:.6em;white-space:pre-wrap;margin:.2em 0 1em}"
    )
    return (
        f'<!doctype html><html><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{escape(title)}</h1>{image}<table>{rows}</table>{more}"
        f"<h2>Samples</h2>{texts or '<p>none</p>'}</body></html>"
    )


def _image(picture: Path) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}" alt="curves">'


def _section(section: Section) -> str:
    head, *rows = [[html.escape(cell) for cell in row] for row in section.rows]
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    image = _image(section.picture) if section.picture is not None and section.picture.is_file() else ""
    return (
        f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>{image}"
        f'<table class="figures">{"".join(lines)}</table>'
    )


def _model_card(facts: dict[str, str], samples: list[tuple[str, str]], picture: Path | None) -> str:
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    texts = "\n\n".join(f"**{prompt.strip() or '(empty)'}**\n\n{_fenced(text)}" for prompt, text in samples)
    curves = f"![curves]({picture.name})\n\n" if picture is not None else ""
    return f"| | |\n|---|---|\n{table}\n\n{curves}## Samples\n\n{texts or 'none'}\n"


def _fenced(text: str) -> str:
    """Return ``text`` between fences longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _plain(value):
    """Return ``value`` with NumPy numbers and tuples turned into what YAML writes plainly."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
