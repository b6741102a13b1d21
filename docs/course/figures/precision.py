"""The smallest step that a number notices, by the type in which it is stored (chapter 14)."""

import math

import torch

TYPES = {"float16": torch.int16, "bfloat16": torch.int16, "float32": torch.int32}  # and whole numbers of that size
SMALLEST, LARGEST = -30, 20  # powers of two
WEIGHT, STEPS = 0.02, (1e-3, 1e-4, 1e-5)  # of a fresh weight, and what AdamW adds to it


def compute() -> dict:
    """Return half the spacing, as a share of the number, at powers of two and just below the next ones."""
    sizes = [2.0**power * part for power in range(SMALLEST, LARGEST) for part in (1.0, 1.984375)]
    curves = {}
    for name, bits in TYPES.items():
        x = torch.tensor(sizes, dtype=torch.float64).to(getattr(torch, name))
        above = (x.view(bits) + 1).view(x.dtype).double()  # the next number has the next bit pattern
        share = (above - x.double()) / 2 / x.double()
        curves[name] = [value if value <= 1 else None for value in share.tolist()]  # not what is 0 or infinite
    return {"sizes": sizes, "curves": curves, "weight": WEIGHT, "steps": STEPS}


def draw(figure, numbers, theme) -> None:
    """Draw the shares over the size, and steps of AdamW on a weight as points: below a line they are lost."""
    figure.set_size_inches(figure.get_figwidth(), 4.2)
    axes = figure.add_subplot()
    sizes = numbers["sizes"]
    colors = dict(zip(numbers["curves"], (theme.series[1], theme.series[0], theme.series[2]), strict=True))
    for name, shares in numbers["curves"].items():
        axes.plot(sizes, [math.nan if share is None else share for share in shares], color=colors[name], linewidth=1.6)
    for name, y in (("bfloat16", 1.1e-2), ("float16", 9e-5), ("float32", 1.6e-7)):
        axes.text(400, y, name, color=colors[name], ha="center", va="center")
    weight = numbers["weight"]
    for step in numbers["steps"]:
        axes.plot([weight], [step / weight], "o", color=theme.text, markersize=4)
        label = rf"$\eta = 10^{{{round(math.log10(step))}}}$"
        axes.annotate(label, (weight, step / weight), xytext=(4, 4), textcoords="offset points", va="bottom")
    axes.axvline(weight, color=theme.muted, linewidth=0.8, linestyle=":")
    axes.axvspan(65504, sizes[-1], color=theme.grid, alpha=0.6, linewidth=0)
    axes.text(2.6e5, 3e-5, "float16: inf", rotation=90, ha="center", va="center", color=theme.muted, fontsize=9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(1e-8, 2)
    axes.set_xlabel("$|w|$")
    axes.set_ylabel(r"$\delta\,/\,|w|$")
    axes.grid()
