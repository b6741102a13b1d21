"""Singular values of what fine-tuning changes in a weight: of full fine-tuning, and of adapters (chapter 18)."""

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from figures.toys import Chain, batches_of, train, trained_on
from minillm.hub import load_model
from minillm.lora import apply_lora, load_lora
from minillm.lora.core import adapted_layers

V = 16
LAYER = "model.layers.1.mlp.up_proj"
RANKS = (2, 8)
LEAST = 1e-4  # of the largest: what is below is rounding


def compute() -> dict:
    """Return the singular values of ΔW after the same fine-tuning, of all weights and of two adapters."""
    base, _ = trained_on(Chain(V), n_steps=400)
    texts = Chain(V, seed=7).texts(32 * 300, 33, torch.Generator().manual_seed(2))
    curves, losses = {}, {}
    for rank in (0, *RANKS):
        model, before = copy.deepcopy(base), base.get_submodule(LAYER).weight
        if rank:
            apply_lora(model, rank=rank, alpha=2 * rank, generator=torch.Generator().manual_seed(0))
        rate = 1e-2 if rank else 2e-3
        steps = train(model, batches_of(texts, 32), n_steps=300, learning_rate=rate)
        layer = model.get_submodule(LAYER)
        change = layer.lora.delta(layer) if rank else layer.weight - before
        name = f"R = {rank}" if rank else "full"
        curves[name], losses[name] = _singular_values(change), sum(steps[-20:]) / 20
    return {"curves": curves, "effective": {name: _effective(values) for name, values in curves.items()},
            "losses": losses}  # fmt: skip


def from_demo(save_dir: Path) -> dict:
    """Return the same of the demo: its fine-tuning of all weights, and its adapter."""
    tuned, before = (load_model(save_dir / name) for name in ("full_sft_128", "pretrain_128"))
    change = tuned.get_submodule(LAYER).weight - before.get_submodule(LAYER).weight
    load_lora(tuned, save_dir / "lora" / "identity_128")
    layer = adapted_layers(tuned)[LAYER]
    curves = {"full": _singular_values(change)}
    curves[f"R = {len(layer.lora.A.weight)}"] = _singular_values(layer.lora.delta(layer))
    return {"curves": curves, "effective": {name: _effective(values) for name, values in curves.items()}}


def _singular_values(matrix: Tensor) -> list[float]:
    values = torch.linalg.svdvals(matrix.detach().double())
    return values[values > LEAST * values[0]].tolist()


def _effective(values: list[float]) -> float:
    """Return the effective rank: the exponential of the entropy of the singular values' shares."""
    total = sum(values)
    return math.exp(-sum(value / total * math.log(value / total) for value in values))


def draw(figure, numbers, theme) -> None:
    """Draw the singular values in their order."""
    figure.set_size_inches(figure.get_figwidth(), 3.4)
    axes = figure.add_subplot()
    longest = max(map(len, numbers["curves"].values()))
    for n, (name, values) in enumerate(numbers["curves"].items()):
        color = theme.series[n]
        axes.plot(range(1, len(values) + 1), values, "o-", color=color, markersize=3.5, linewidth=1.2)
        label = f"{name}: $e^H$ = {numbers['effective'][name]:.1f}"
        if "losses" in numbers:
            label += f", loss = {numbers['losses'][name]:.2f}"
        is_longest = len(values) == longest
        axes.annotate(
            label, (len(values), values[-1]), xytext=(0, -8) if is_longest else (6, 0), textcoords="offset points",
            ha="right" if is_longest else "left", va="top" if is_longest else "center", color=color,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0, 1.02 * longest)
    axes.margins(y=0.12)
    axes.set_xlabel("$i$")
    axes.set_ylabel(r"$\sigma_i(\Delta W)$")
    axes.grid()
