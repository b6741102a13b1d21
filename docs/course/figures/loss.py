"""A training loss on its way down to the entropy of its texts (chapter 5)."""

import math
from pathlib import Path

from figures.style import label_end
from figures.toys import Chain, trained_on
from minillm.config import ModelConfig
from minillm.reports.tracking import read_metrics

V = 16
N_STEPS = 800
WINDOW = 10  # steps of a point


def compute() -> dict:
    """Return the loss of a small model on texts in which two tokens decide about the next one, and its entropies."""
    chain = Chain(V)
    _, losses = trained_on(chain, n_steps=N_STEPS)
    points = [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, N_STEPS, WINDOW)]
    _, of_one, floor = chain.entropies()
    levels = [[r"$\ln V$", math.log(V)], [r"$H(x_t\,|\,x_{t-1})$", of_one], [r"$H(x_t\,|\,x_{t-2},x_{t-1})$", floor]]
    return {"steps": [i + WINDOW / 2 for i in range(0, N_STEPS, WINDOW)], "losses": points, "levels": levels}


def from_demo(save_dir: Path) -> dict:
    """Return the same of the demo's pretraining."""
    rows = read_metrics(save_dir / "pretrain_128" / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    floor = [row["floor"] for row in rows if row.get("floor") is not None][-1]
    vocab_size = ModelConfig.from_hf(save_dir / "pretrain_128").vocab_size
    levels = [[r"$\ln V$", math.log(vocab_size)], ["$F$", floor]]
    return {"steps": [row["step"] for row in train], "losses": [row["loss"] for row in train], "levels": levels}


def draw(figure, numbers, theme) -> None:
    """Draw the loss over the steps, and a line for each entropy."""
    figure.set_size_inches(figure.get_figwidth(), 3.6)
    axes = figure.add_subplot()
    axes.plot(numbers["steps"], numbers["losses"], color=theme.series[0], linewidth=2.2)
    end = numbers["steps"][-1] * 1.02
    for n, (name, value) in enumerate(numbers["levels"]):
        is_floor = n == len(numbers["levels"]) - 1
        color = theme.series[1] if is_floor else theme.muted
        axes.axhline(value, color=color, linestyle="-" if is_floor else "--", linewidth=1.2, zorder=1)
        label_end(axes, end, value, f"{name} = {value:.2f}", color, annotation_clip=False)
    axes.set_xlim(0, end)
    axes.set_ylim(0, max(value for _, value in numbers["levels"]) * 1.08)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
