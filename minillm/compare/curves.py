"""The curves of several runs over each other, and the small curves of an index."""

from pathlib import Path

from minillm.compare.runs import RunRecord
from minillm.reports.chart import axis_of, polyline
from minillm.reports.page import drawing, save_and_cut
from minillm.reports.summary import log_scale_if_wide

COLORS = ("#2f5fa8", "#c2571a", "#3b7d3b", "#8a5a9e", "#b3402a", "#5f6b73", "#b8901f", "#1f8f8f", "#d16ba5", "#7a5c3e")
STYLES = ("-", "--", ":", "-.")
X_NAMES = {"step": "step", "tokens": "tokens seen", "seconds": "training time"}
FIGURES = {
    "bits_per_byte": "bits per byte", "accuracy": "share of replies on the right side",
    "margin": "margin of the rewards", "kl": "distance from the reference, nats",
    "reward_chosen": "reward of the chosen reply", "reward_rejected": "reward of the rejected reply",
    "reward_good": "reward of good replies", "reward_bad": "reward of bad replies",
    "log_prob_chosen": "log-probability of the chosen reply",
    "log_prob_rejected": "log-probability of the rejected reply",
    "log_prob_good": "log-probability of good replies", "log_prob_bad": "log-probability of bad replies",
    "length_chosen": "tokens of the chosen reply", "length_rejected": "tokens of the rejected reply",
}  # fmt: skip
MAX_NAME = 40


def panels_of(runs: list[RunRecord]) -> list[tuple[str, str, str, list[RunRecord]]]:
    """Return (title, split, key, runs) of each panel: losses by what they count, figures, and the course of training.

    Losses per token, per pair and per reply are different quantities, so each has panels of its own.
    """
    panels = []
    for unit in dict.fromkeys(run.unit for run in runs):
        alike = [run for run in runs if run.unit == unit]
        for split, name in (("train", "training"), ("valid", "validation")):
            panels.append((f"{name} loss, nats per {unit}", split, "loss", alike))
    for key in dict.fromkeys(key for run in runs for key in run.figures):
        panels.append((f"validation: {words(key)}", "valid", key, runs))
    for key, title in (
        ("lr", "learning rate"), ("grad_norm", "gradient norm"), ("tokens_per_s", "tokens per second"),
        ("gpu_peak_gib", "peak memory of the GPU, GiB"), ("cpu_memory_gib", "resident memory of the process, GiB"),
    ):  # fmt: skip
        panels.append((title, "train", key, runs))
    return [panel for panel in panels if any(run.points(panel[1], panel[2]) for run in panel[3])]


def draw_runs(runs: list[RunRecord], path: Path, *, x: str = "step") -> list[bytes]:
    """Draw each figure of all runs over ``x`` (step, tokens or seconds); return the panels, each as a PNG of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with drawing() as plt:
        return _draw(plt, runs, path, x)


def _draw(plt, runs: list[RunRecord], path: Path, x: str) -> list[bytes]:
    from matplotlib.ticker import EngFormatter, FuncFormatter

    panels = panels_of(runs)
    n_rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(n_rows, 2, figsize=(11, 3.6 * n_rows), squeeze=False)
    looks = {run.name: (COLORS[i % 10], STYLES[i // 10 % 4]) for i, run in enumerate(runs)}
    for axis, (title, split, key, shown) in zip(axes.flat, panels, strict=False):
        for run in shown:
            points, (color, style) = run.points(split, key, x=x), looks[run.name]
            if points:
                marker = "o" if split == "valid" or len(points) == 1 else None
                axis.plot(
                    *zip(*points, strict=True), style, color=color, marker=marker, markersize=4, label=_short(run.name)
                )
        axis.set(title=title, xlabel=X_NAMES[x])
        if key == "loss":
            log_scale_if_wide(axis, [value for run in shown for _, value in run.points(split, key)])
        if x == "tokens":
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        elif x == "seconds":
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _clock(value)))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    cuts = save_and_cut(figure, path, dpi=110)
    plt.close(figure)
    return cuts


def words(key: str) -> str:
    """Return what pages call a figure of a validation."""
    return FIGURES.get(key, key.replace("_", " "))


def small_curve(run: RunRecord, *, width: int = 140, height: int = 36) -> str:
    """Return the losses of training and validation as a small picture (SVG)."""
    curves = {"#7fa7d6": run.points("train", "loss"), "#b3402a": run.points("valid", "loss")}
    points = [point for each in curves.values() for point in each]
    if not points:
        return ""
    x = axis_of([step for step, _ in points], start=2, end=width - 2)
    y = axis_of([loss for _, loss in points], start=height - 2, end=2)
    lines = ""
    for color, curve in curves.items():
        if curve:
            lines += f'<polyline points="{polyline(curve, x, y)}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="loss">{lines}</svg>'


def _short(name: str) -> str:
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
