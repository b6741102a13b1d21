"""The two heads that copy: one looks at the token before, the other at what came after the same token (chapter 7)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from figures.toys import new_model, train
from minillm.explain import trace
from minillm.hub import open_model

V, T, B = 16, 24, 32
SHOWN = [10, 14, 3, 0, 7]  # repeated, the text whose maps are drawn
LEAST = 0.01  # weight that is drawn


def rows(generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Yield batches of texts that repeat 4 to 10 different tokens; only what can be known has a target."""
    while True:
        period = torch.randint(4, 11, (B, 1), generator=generator)
        text = torch.rand(B, V, generator=generator).argsort(dim=1)  # (B, V): a permutation of the tokens
        ids = text.gather(1, torch.arange(T + 1) % period)  # (B, T + 1)
        targets = ids[:, 1:].masked_fill(torch.arange(1, T + 1) <= period, -100)
        yield {"input_ids": ids[:, :-1], "targets": targets}


def compute() -> dict:
    """Return the maps of two heads of a small model that has learned to copy."""
    model = new_model(V, intermediate_size=128, initializer_range=0.1)
    train(model, rows(torch.Generator().manual_seed(0)), n_steps=500, learning_rate=3e-3)
    ids = (SHOWN * 3)[:13]
    return _maps(model, ids, ["ABCDEFGHIJKLMNOP"[token] for token in ids], len(SHOWN))


def from_demo(save_dir: Path) -> dict:
    """Return the same two maps of the demo's model, in a text that repeats itself."""
    model, tokenizer = open_model(str(save_dir / "pretrain_128"), device="cpu")
    half = tokenizer.encode("Now add:38+86=")
    ids = (half + half)[:16]
    return _maps(model, ids, [tokenizer.decode([token]).replace(" ", "␣") for token in ids], len(half))


def _maps(model, ids: list[int], tokens: list[str], period: int) -> dict:
    """Return the head that looks most at the token before, and the one that looks most behind the same token."""
    layers = [part.probabilities for part in trace(model, ids).parts if part.kind == "attention"]  # (H, T, T) each
    maps = []
    for back, first in ((1, 1), (period - 1, period)):
        queries = torch.arange(first, len(ids))
        scores = torch.stack([heads[:, queries, queries - back].mean(dim=1) for heads in layers])  # (layers, H)
        layer, head = divmod(int(scores.argmax()), scores.shape[1])
        weights = [[round(weight, 3) for weight in line] for line in layers[layer][head].tolist()]
        maps.append({"title": f"layers.{layer}, head {head}", "weights": weights})
    return {"tokens": tokens, "maps": maps}


def draw(figure, numbers, theme) -> None:
    """Draw a square per pair of tokens; row: who looks, column: at whom; the darker, the more."""
    from matplotlib.patches import Rectangle

    tokens = numbers["tokens"]
    figure.set_size_inches(figure.get_figwidth(), 3.75)
    for axes, found in zip(figure.subplots(1, 2), numbers["maps"], strict=True):
        for query, line in enumerate(found["weights"]):
            for key, weight in enumerate(line[: query + 1]):
                axes.add_patch(
                    Rectangle(
                        (key, query), 1, 1, edgecolor=theme.grid, linewidth=0.6,
                        facecolor=theme.shade(weight if weight >= LEAST else 0.0),
                    )
                )  # fmt: skip
        axes.set_xlim(0, len(tokens))
        axes.set_ylim(len(tokens), 0)
        axes.set_aspect("equal")
        axes.set_title(found["title"])
        places = [n + 0.5 for n in range(len(tokens))]
        axes.set_xticks(places, tokens, color=theme.text, rotation=90 if max(map(len, tokens)) > 1 else 0)
        axes.set_yticks(places, tokens, color=theme.text)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
