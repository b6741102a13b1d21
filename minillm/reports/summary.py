"""What a run leaves for people: ``run.yaml``, ``summary.png``, ``summary.html`` and the model card ``README.md``."""

import html
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
from minillm.files import replace_text
from minillm.model.router_stats import relative_entropy
from minillm.reports.chart import is_wide
from minillm.reports.page import (
    drawing,
    facts_table,
    large_picture,
    no_picture,
    note,
    page,
    pictures,
    save_and_cut,
    wide_table,
)
from minillm.reports.tracking import read_metrics

MAX_ANSWER_STEPS = 6  # columns of the table of answers
# What a row of metrics calls a figure, and what a picture calls it.
WORDS = {
    "reward_chosen": "chosen reply", "reward_rejected": "rejected reply", "reward_good": "good reply",
    "reward_bad": "bad reply", "log_prob_chosen": "chosen reply", "log_prob_rejected": "rejected reply",
    "log_prob_good": "good reply", "log_prob_bad": "bad reply", "tokens_per_s": "all ranks",
    "cpu_memory_gib": "CPU: resident", "gpu_memory_gib": "GPU: tensors now", "gpu_peak_gib": "GPU: tensors, peak",
    "gpu_reserved_gib": "GPU: held by the allocator", "cpu_percent": "CPU (100 is one core)", "gpu_percent": "GPU",
    "gpu_temperature_c": "°C", "gpu_power_w": "W",
}  # fmt: skip
MACHINE = (
    ("tokens per second", ("tokens_per_s",)),
    ("memory, GiB", ("gpu_reserved_gib", "gpu_peak_gib", "gpu_memory_gib", "cpu_memory_gib")),
    ("use, %", ("gpu_percent", "cpu_percent")),
    ("temperature and power of the GPU", ("gpu_temperature_c", "gpu_power_w")),
)
COLORS = ("#2f5fa8", "#b3402a", "#3b7d3b", "#8a5a9e")
WHY_ABOVE = (
    "Why is the training loss above the validation loss? A point of training is a mean over the steps since the last "
    "point, each measured before its update, with dropout if there is any; validation comes after the updates. And "
    "they are different texts: where the training file holds some that are harder to foresee (several right answers, "
    "texts written freely), its loss stays higher, however long the training. With a teacher, training has another "
    "loss."
)


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
    with writable(directory):
        replace_text(directory / "run.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


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
    metrics: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> None:
    """Write the picture, the page and the model card of a finished run.

    The page also shows the answers of ``samples.jsonl``, a table of questions and steps.

    Without matplotlib the page has no picture and says how to get one; nothing else is lost.

    Args:
        facts: rows of the page's table. samples: pairs (prompt, text). unit: what the loss counts.
        stage, tags, usage: of the model card. report: prints a line. metrics: of the validations; those besides the
            loss are drawn. sections: of the page, after the table.
    """
    rows = read_metrics(directory / "metrics.jsonl")
    picture = directory / "summary.png"
    with writable(directory):
        try:
            panels = draw_curves(rows, picture, title=directory.name, unit=unit, metrics=metrics)
        except ImportError:
            picture, panels = None, None
            report("no summary.png: drawing needs matplotlib: pip install matplotlib")
        head = f"---\n{tags}\n---\n\n# {directory.name}\n\nTrained with minillm, stage `{stage}`. {usage}\n\n"
        text = _page(directory, facts, samples, panels, rows, sections)
        (directory / "summary.html").write_text(text, encoding="utf-8")
        (directory / "README.md").write_text(head + _model_card(facts, samples, picture), encoding="utf-8")


def draw_curves(
    rows: list[dict], path: Path, *, title: str, unit: str = "token", metrics: Sequence[str] = ()
) -> list[bytes]:
    """Draw loss (training, validation, entropy floor), learning rate and gradient norm against the step.

    Rows of a mixture of experts add two pictures below: how busy each sparse layer's busiest expert is, in units of
    its fair share (1: all alike), and the entropy of the load in units of ln E (1: all alike). Rows of preference
    tuning add its figures below. Then come the first four of ``metrics`` that are not the loss; the first of
    ``metrics`` decides which weights are kept, so its best value is marked. Last come speed, memory and use of the
    machine, as far as the rows have them.

    Returns:
        each panel as a PNG of its own, for pages that are read on a phone.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with drawing() as plt:
        return _draw_curves(plt, rows, path, title, unit, metrics)


def _draw_curves(plt, rows: list[dict], path: Path, title: str, unit: str, metrics: Sequence[str]) -> list[bytes]:
    train = [row for row in rows if row["split"] == "train"]
    valid = [row for row in rows if row["split"] == "valid"]
    loads = [(row["step"], row["expert_share"]) for row in train if row.get("expert_share")]
    is_preference = any("accuracy" in row for row in train) or any("margin" in row for row in valid)
    drawn = [name for name in metrics if name != "loss" and any(row.get(name) is not None for row in valid)][:4]
    machine = [(name, keys) for name, keys in MACHINE if any(row.get(key) is not None for row in train for key in keys)]
    n_rows = 1 + bool(loads) + is_preference + bool(drawn) + bool(machine)
    figure = plt.figure(figsize=(12, 3.6 * n_rows))
    grid = figure.add_gridspec(n_rows, 4)
    loss_axis, lr_axis, norm_axis = (figure.add_subplot(grid[0, columns]) for columns in (slice(2), 2, 3))
    loss_axis.plot([r["step"] for r in train], [r["loss"] for r in train], color="#7fa7d6", label="training")
    if valid:
        steps, losses = [r["step"] for r in valid], [r["loss"] for r in valid]
        loss_axis.plot(steps, losses, "o-", color="#b3402a", label="validation")
        floor = valid[-1].get("floor")
        if floor is not None:
            loss_axis.axhline(floor, color="#3b7d3b", linestyle="--", label=f"entropy floor {floor:.3f}")
    loss_axis.set(title=f"{title}: loss", xlabel="step", ylabel=f"nats per {unit}")
    log_scale_if_wide(loss_axis, [row["loss"] for row in rows if row["loss"]])
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
        row = 1 + bool(loads)
        _draw_preference([figure.add_subplot(grid[row, column]) for column in range(4)], train, valid)
    for column, name in enumerate(drawn):
        points = [(row["step"], row[name]) for row in valid if row.get(name) is not None]
        axis = figure.add_subplot(grid[1 + bool(loads) + is_preference, column])
        axis.plot(*zip(*points, strict=True), "o-", color="#b3402a", label=name)
        if name == metrics[0]:
            axis.plot(*max(points, key=lambda point: point[1]), "*", color="#3b7d3b", markersize=16, label="best/")
            axis.legend()
        axis.set(title=f"{name} of validation", xlabel="step")
    for column, (name, keys) in enumerate(machine):
        _draw_machine(figure.add_subplot(grid[-1, column]), name, keys, train)
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    panels = save_and_cut(figure, path, dpi=110)
    plt.close(figure)
    return panels


def log_scale_if_wide(axis, losses: list[float]) -> None:
    """Give losses a logarithmic axis where the first steps would flatten all that follows."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if is_wide(losses):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


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
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        color=color,
                        label=WORDS.get(name, name) if style == "-" else None,
                    )
        axis.set(title=title, xlabel="step")
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize="small")


def _draw_machine(axis, title: str, keys: tuple[str, ...], train: list[dict]) -> None:
    """Draw figures of speed, memory or use, from 0."""
    for key, color in zip(keys, COLORS, strict=False):
        points = [(row["step"], row[key]) for row in train if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, label=WORDS[key])
    axis.set(title=title, xlabel="step")
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    if len(keys) > 1:
        axis.legend(fontsize="small")


def git_revision() -> str | None:
    """Return the revision of the code's own checkout, or None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _page(
    directory: Path,
    facts: dict[str, str],
    samples: list[tuple[str, str]],
    panels: list[bytes] | None,
    rows: list[dict],
    sections: Sequence[Section],
) -> str:
    parts = [no_picture() if panels is None else pictures(panels, alt="curves"), facts_table(facts)]
    last = {row["split"]: row["loss"] for row in rows if row.get("loss") is not None}
    if last.get("train", 0) > last.get("valid", float("inf")):
        parts.insert(1, note(WHY_ABOVE))
    parts += map(_section, sections)
    parts += [_answer_table(read_metrics(directory / "samples.jsonl")), "<h2>Samples</h2>", _texts(samples)]
    parts.append(note(f"Next to other runs: python -m minillm.compare {directory} OTHER_RUN"))
    return page(directory.name, *parts)


def _texts(samples: list[tuple[str, str]]) -> str:
    texts = (f"<div><b>{html.escape(a)}</b><pre>{html.escape(b)}</pre></div>" for a, b in samples)
    return "".join(texts) or "<p>none</p>"


def _answer_table(answers: list[dict]) -> str:
    """Return a table of what the model answered at validations: a row per question, a column per step.

    Args:
        answers: rows of ``samples.jsonl``. Of many steps the first, the last and some between them are shown.
    """
    if not answers:
        return ""
    steps = sorted({row["step"] for row in answers})
    n = min(len(steps), MAX_ANSWER_STEPS)
    shown = [steps[round(index * (len(steps) - 1) / max(1, n - 1))] for index in range(n)]
    texts: dict[int, list[dict]] = {step: [row for row in answers if row["step"] == step] for step in shown}
    head = "".join(f"<th>{name}</th>" for name in ("question", *(f"step {step:,}" for step in shown), "expected"))
    body = ""
    for number, last in enumerate(texts[shown[-1]]):
        cells = [last["question"]]
        for step in shown:
            row = texts[step][number] if number < len(texts[step]) else {}
            is_same = row.get("question") == last["question"]  # a resumed run may have other questions than before
            cells.append(row["answer"] if is_same else "")
        cells.append(last["expected"])
        body += "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>"
    return f'<h2>Answers over time</h2><div class="wide"><table class="answers"><tr>{head}</tr>{body}</table></div>'


def _section(section: Section) -> str:
    has_picture = section.picture is not None and section.picture.is_file()
    head, *rows = [[html.escape(cell) for cell in row] for row in section.rows]
    parts = [f"<h2>{html.escape(section.title)}</h2>", note(section.text)]
    if has_picture:
        parts.append(large_picture(section.picture.read_bytes(), alt=section.title))
    return "".join([*parts, wide_table(head, rows)])


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
