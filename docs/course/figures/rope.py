"""Pairs that turn at their own speeds, and what is left of a score at a distance (chapter 8)."""

import torch

from minillm.config import ModelConfig
from minillm.model.rope import apply_rope, rope_frequencies, rope_tables

N_POSITIONS = 7
PAIRS, BASE = 4, 16.0
DECAY_BASES = (1e4, 1e6)
DECAY_WIDTH = 64  # K


def compute() -> dict:
    """Return where each pair of (1, 0) is turned at the positions 0 to 6, and the mean of the cosines by distance."""
    config = _config(2 * PAIRS, BASE)
    positions = torch.arange(N_POSITIONS)[None]  # (1, T)
    start = torch.cat([torch.ones(PAIRS), torch.zeros(PAIRS)]).double()  # number i is paired with number i + K/2
    turned = _turned(start.expand(1, N_POSITIONS, 1, -1), positions, config)[0, :, 0]  # (T, K)
    frequencies, _ = rope_frequencies(positions, config, dtype=torch.float64)
    points = torch.stack([turned[:, :PAIRS], turned[:, PAIRS:]], dim=-1).transpose(0, 1)  # (pairs, T, 2)
    distances = torch.logspace(0, 5, 240).round().long().unique()
    curves = {}
    for base in DECAY_BASES:
        ones = torch.ones(1, len(distances), 1, DECAY_WIDTH, dtype=torch.float64)
        score = (_turned(ones, distances[None], _config(DECAY_WIDTH, base)) * ones).mean(dim=-1)  # (1, T, 1)
        curves[f"{base:.0e}"] = score.flatten().tolist()
    return {"frequencies": frequencies.tolist(), "points": points.tolist(), "distances": distances.tolist(),
            "curves": curves}  # fmt: skip


def _config(width: int, base: float) -> ModelConfig:
    return ModelConfig(hidden_size=width, num_attention_heads=1, num_key_value_heads=1, rope_theta=base)


def _turned(x, positions, config):
    """Return x (B, T, H, K) turned as at positions (B, T)."""
    return apply_rope(x, *rope_tables(positions, config, dtype=x.dtype))


def _every(frequency: float) -> int:
    """Return how many positions lie between two numbers on a clock, so that they do not touch."""
    return 1 if frequency > 0.2 else 3


def draw(figure, numbers, theme) -> None:
    """Draw a clock per pair, with the positions on it, and below the decay."""
    figure.set_size_inches(figure.get_figwidth(), 4.6)
    grid = figure.add_gridspec(2, PAIRS, height_ratios=(1, 1.25))
    angles = torch.linspace(0, 2 * torch.pi, 200)
    for pair, points in enumerate(numbers["points"]):
        axes = figure.add_subplot(grid[0, pair])
        axes.plot(angles.cos(), angles.sin(), color=theme.grid, linewidth=1)
        for position, (x, y) in enumerate(points):
            color = theme.shade(0.35 + 0.65 * position / (N_POSITIONS - 1))
            axes.plot([0, x], [0, y], color=color, linewidth=1.6)
            if position % _every(numbers["frequencies"][pair]) == 0:
                axes.text(1.2 * x, 1.2 * y, position, ha="center", va="center", fontsize=8.5)
        axes.set_title(rf"$i = {pair}$,  $\theta_{pair} = {numbers['frequencies'][pair]:g}$", fontsize=10)
        axes.set_xlim(-1.35, 1.35)
        axes.set_ylim(-1.35, 1.35)
        axes.set_aspect("equal")
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    for n, (base, curve) in enumerate(numbers["curves"].items()):
        exponent = int(base.split("+")[1])
        axes.plot(numbers["distances"], curve, color=theme.series[n], label=f"$b = 10^{exponent}$")
    axes.axhline(0, color=theme.muted, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(1, numbers["distances"][-1])
    axes.set_ylim(-0.3, 1.05)
    axes.set_xlabel("$d$")
    axes.legend(title=r"$(2/K)\,\sum_i \cos(d\,\theta_i)$")
