"""Documents in rows, one each and packed, and the mask of a packed row (chapter 4)."""

from itertools import pairwise

import numpy as np
import torch

from minillm.data.packing import best_fit
from minillm.model.attention_plan import document_mask

ROW_LEN = 16


def compute() -> dict:
    """Return the lengths of twelve documents, the packed rows, and who sees whom in the one with most documents."""
    lengths = np.random.default_rng(34).integers(2, 13, size=12)
    order, starts = best_fit(lengths, ROW_LEN)
    rows = [order[start:end].tolist() for start, end in pairwise(starts)]
    shown = max(range(len(rows)), key=lambda row: len(rows[row]))
    ids = [place for place, document in enumerate(rows[shown]) for _ in range(lengths[document])]
    ids += [-1] * (ROW_LEN - len(ids))  # padding
    mask = document_mask(torch.tensor([ids]))[0, 0]  # (T, T)
    return {"lengths": lengths.tolist(), "rows": rows, "shown": shown, "mask": mask.int().tolist()}


def draw(figure, numbers, theme) -> None:
    """Draw the rows on the left and the mask on the right; a document has one colour everywhere."""
    from matplotlib.patches import Rectangle

    lengths, rows, shown = numbers["lengths"], numbers["rows"], numbers["shown"]
    figure.set_size_inches(figure.get_figwidth(), 4.3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))

    def color(document: int) -> str:
        return theme.series[document % len(theme.series)]

    def draw_rows(content: list[list[int]], top: float) -> None:
        for line, documents in enumerate(content):
            y, x = top - line, 0
            left.add_patch(Rectangle((0, y - 0.42), ROW_LEN, 0.84, facecolor=theme.grid, edgecolor="none"))
            for document in documents:
                size = lengths[document]
                style = {"facecolor": color(document), "edgecolor": theme.background, "linewidth": 1}
                left.add_patch(Rectangle((x, y - 0.42), size, 0.84, **style))
                left.text(x + size / 2, y - 0.03, size, ha="center", va="center", color=theme.ink, fontsize=8.5)
                x += size

    share = sum(lengths) / ROW_LEN
    top = len(lengths) + len(rows) + 2.2
    left.text(0, top + 1, f"{len(lengths)} × {ROW_LEN}: {share / len(lengths):.0%}", va="center")
    draw_rows([[document] for document in range(len(lengths))], top)
    below = len(rows) - 1
    left.text(0, below + 1.1, f"best_fit, {len(rows)} × {ROW_LEN}: {share / len(rows):.0%}", va="center")
    draw_rows(rows, below)
    left.annotate(
        "", (18.2, below - shown), (16.3, below - shown), arrowprops={"arrowstyle": "<-", "color": theme.text}
    )
    left.set_xlim(0, 18.5)
    left.set_ylim(-0.8, top + 1.6)
    left.axis("off")

    places = [document for document in rows[shown] for _ in range(lengths[document])]
    for query, line in enumerate(numbers["mask"]):
        for key, is_seen in enumerate(line):
            is_padding = query >= len(places)
            face = theme.background if not is_seen else theme.muted if is_padding else color(places[query])
            right.add_patch(Rectangle((key, query), 1, 1, facecolor=face, edgecolor=theme.grid, linewidth=0.6))
    right.set_xlim(0, ROW_LEN)
    right.set_ylim(ROW_LEN, 0)
    right.set_aspect("equal")
    right.set_title("document_mask")
    right.set_xticks([0.5, 5.5, 10.5, 15.5], [0, 5, 10, 15])
    right.set_yticks([0.5, 5.5, 10.5, 15.5], [0, 5, 10, 15])
    right.set_xlabel("$s$")
    right.set_ylabel("$t$", rotation=0, labelpad=8)
    right.spines[:].set_visible(False)
    right.tick_params(length=0)
