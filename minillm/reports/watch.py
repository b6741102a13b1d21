"""``--monitor``: an adapter's figures go into ``monitor.jsonl`` and ``monitor.png``, what is wrong onto the screen.

The page of the run shows the last look, the state of the optimizer included, and the tokens that are most often a
target.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from minillm.data.report import special_ids, token_text
from minillm.lora.more.monitor import LARGE_DELTA, LARGE_UPDATE, Monitor
from minillm.reports.summary import Section
from minillm.reports.tracking import read_metrics, truncate_metrics

SPECIAL_SHARE, ONE_TOKEN_SHARE = 0.25, 0.30  # of the targets, above which it is reported
N_TARGETS_SHOWN = 20
FIGURES = {  # of the page's table: a row's key, and what it is called
    "grad_norm_A": "‖∇A‖", "grad_norm_B": "‖∇B‖", "grad_ratio": "∇B : ∇A",
    "adam_mean_A": "m of A", "adam_mean_B": "m of B", "adam_rms_A": "√v of A", "adam_rms_B": "√v of B",
    "adam_step_A": "step of A", "adam_step_B": "step of B", "update_ratio_A": "ΔA : A", "update_ratio_B": "ΔB : B",
    "update_ratio": "step : W", "delta_ratio": "ΔW : W", "effective_rank": "rank",
}  # fmt: skip
COLORS = ("#2f5fa8", "#c2571a", "#3b7d3b", "#8a5a9e", "#b3402a", "#5f6b73", "#b8901f", "#1f8f8f", "#d16ba5", "#7a5c3e")


class Watch:
    """Watches the adapter of a model while it is trained; ``Run`` calls it, on all ranks if they hold parts of it.

    Args:
        directory: of the run. rows: training rows with ``target_counts``, looked at once, before the first step.
        interval: steps between looks. replays: whether old data is mixed in already, which some warnings advise.
        engine: of the run (None: this process holds everything). All ranks see the figures, the main one writes them.
        report: prints a line.
    """

    def __init__(
        self,
        model,
        directory: Path,
        tokenizer,
        rows,
        *,
        interval: int,
        replays: bool = False,
        engine=None,
        report: Callable[[str], None] = tqdm.write,
    ):
        is_sharded = engine is not None and not engine.has_whole_gradients
        self.monitor = Monitor(model, interval=interval, engine=engine if is_sharded else None)
        self.directory, self.replays, self.report = directory, replays, report
        self.is_main = engine is None or engine.ranks.is_main
        self.path = directory / "monitor.jsonl"
        self.before_start = target_warnings(rows.target_counts, tokenizer)
        self.targets = target_table(rows.target_counts, tokenizer)
        self._is_open = False

    def before_update(self, step: int) -> None:
        """See the gradients, clipped."""
        self.monitor.before_update(step)

    def after_update(self, step: int, optimizer) -> None:
        """See what the update did, and write it down if a look was due."""
        last_look = self.monitor.last_check
        row = self.monitor.after_update(step, optimizer)
        if row is None or not self.is_main:
            return
        if not self._is_open:  # rows past the checkpoint that the run resumed from are written again
            truncate_metrics(self.path, after_step=last_look)
            self._is_open = True
        if not last_look:
            row["warnings"] = self.before_start + row["warnings"]
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for warning in row["warnings"]:
            if self.replays:
                warning = warning.replace("mix in old data, or ", "").replace(", or mix in old data", "")
            self.report(f"warning, step {step}: {warning}")

    def finish(self) -> None:
        """Print what the last look says, and draw all of them."""
        for note in self.monitor.notes():
            self.report(f"adapter: {note}")
        rows = read_metrics(self.path)
        if not rows:
            return  # resumed after the last look
        try:
            draw_monitor(rows, self.path.with_suffix(".png"), title=self.directory.name)
        except ImportError:
            self.report("no monitor.png: drawing needs matplotlib: pip install matplotlib")

    def sections(self) -> list[Section]:
        """Return what the page of the run shows: the last look, medians by kind of layer, and the targets."""
        rows = read_metrics(self.path)
        if not rows:
            return []
        about = (
            "Medians over the layers of each kind. ∇: norms of the gradients, clipped. m and √v: root mean squares of "
            "AdamW's exp_avg and of the root of exp_avg_sq. Step: mean size of AdamW's step in learning rates (1: all "
            "gradients agree; near 0: they cancel). ΔA : A and ΔB : B: what the update changed, relative to the "
            "matrix; step : W: what it changed of the layer's weight; ΔW : W: what all updates have changed of it; "
            "rank: the effective rank of ΔW."
        )
        title = f"Adapter at step {rows[-1]['step']}"
        special = "Tokens that the loss asks for in the training data; * marks the special ones."
        return [
            Section(title, about, layer_table(rows[-1]["layers"]), self.path.with_suffix(".png")),
            Section(f"The {len(self.targets) - 1} most frequent targets", special, self.targets),
        ]

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return self.monitor.state()

    def load_state(self, state: dict | None) -> None:
        """Go on from it; None: the run was not watched so far."""
        if state is not None:
            self.monitor.load_state(state)


def target_warnings(counts: np.ndarray, tokenizer) -> list[str]:
    """Return what is odd about the targets of a training set.

    Args:
        counts: (V,) how often each token is a target.
    """
    total, found = counts.sum(), []
    if not total:
        return found
    special = sum(int(counts[i]) for i in tokenizer.special_ids if i < len(counts)) / total
    if special > SPECIAL_SHARE:
        found.append(
            f"special tokens are {special:.0%} of your targets: the answers are very short, or the template's own "
            "tokens are trained on; the loss mostly tells how well these are known"
        )
    most = int(counts.argmax())
    if counts[most] > ONE_TOKEN_SHARE * total:
        text = tokenizer.decode([most])
        found.append(f"one token, {text!r}, is {counts[most] / total:.0%} of your targets: is the data what you meant?")
    return found


def target_table(counts: np.ndarray, tokenizer, *, n: int = N_TARGETS_SHOWN) -> list[list[str]]:
    """Return the ``n`` most frequent targets of a training set as rows of text, with a head.

    Args:
        counts: (V,) how often each token is a target.
    """
    special, total = special_ids(tokenizer), max(1, int(counts.sum()))
    order = [int(i) for i in np.argsort(-counts, kind="stable")[:n] if counts[i]]
    rows = [
        [f"{i}{'*' if i in special else ''}", token_text(tokenizer, i), f"{counts[i]:,}", f"{counts[i] / total:.1%}"]
        for i in order
    ]
    return [["id", "token", "times", "share"], *rows]


def layer_table(layers: dict[str, dict]) -> list[list[str]]:
    """Return the figures of a look as rows of text, with a head: medians over the layers of each kind.

    Args:
        layers: of a row of ``monitor.jsonl``.
    """
    head = ["layers", *FIGURES.values()]
    return [head] + [
        [f"{kind} ({len(names)})", *(_median_text(layers, names, key) for key in FIGURES)]
        for kind, names in _kinds(layers).items()
    ]


def _median_text(layers: dict[str, dict], names: list[str], key: str) -> str:
    values = [layers[name][key] for name in names if layers[name][key] is not None]
    return f"{median(values):.3g}" if values else "-"


def draw_monitor(rows: list[dict], path, *, title: str) -> None:
    """Draw gradients, their ratio, ‖ΔW‖/‖W‖, effective rank and updates against the step, by kind of layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(16, 8))
    steps = [row["step"] for row in rows]
    for key, color in (("A", "#2f5fa8"), ("B", "#c2571a")):
        norms = [sorted(layer[f"grad_norm_{key}"] for layer in row["layers"].values()) for row in rows]
        axes[0, 0].plot(steps, [median(some) or None for some in norms], color=color, label=key)
        low, high = ([some[int(share * (len(some) - 1))] for some in norms] for share in (0.1, 0.9))
        axes[0, 0].fill_between(steps, low, high, color=color, alpha=0.2)
    panels = (
        (axes[0, 1], "grad_ratio", "gradient norm of B : A"),
        (axes[0, 2], "update_ratio", "what one step changes of the weight"),
        (axes[1, 0], "delta_ratio", "|dW| / |W|"),
        (axes[1, 1], "effective_rank", "effective rank of dW"),
        (axes[1, 2], "adam_step_B", "AdamW's steps of B, in learning rates"),
    )
    for axis, key, name in panels:
        curves = medians_by_kind(rows, key)
        for (kind, middle), color in zip(curves.items(), COLORS * len(curves), strict=False):
            axis.plot(steps, middle, color=color, label=kind, linewidth=1.3)
        axis.set_title(name)
    axes[0, 0].set_title("gradient norm (clipped): median, 10-90 % of layers")
    for axis, limit in ((axes[0, 2], LARGE_UPDATE), (axes[1, 0], LARGE_DELTA)):
        if axis.get_ylim()[1] > limit / 10:
            axis.axhline(limit, color="#b3402a", linestyle=":", label="warning")
    for axis in (axes[0, 0], axes[0, 1], axes[0, 2], axes[1, 0]):
        if any(np.nanmax(np.asarray(line.get_ydata(), dtype=float), initial=0) > 0 for line in axis.lines):
            axis.set_yscale("log", nonpositive="mask")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (axes[0, 0], axes[0, 1]):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small", ncols=2)
    figure.suptitle(f"{title}: medians over the layers of each kind")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def medians_by_kind(rows: list[dict], key: str) -> dict[str, list[float]]:
    """Return for each kind of layer the median of a figure at each look; NaN where no layer of the kind has it."""
    curves = {}
    for kind, layers in _kinds(rows[-1]["layers"]).items():
        values = [[row["layers"][layer][key] for layer in layers] for row in rows]
        curves[kind] = [median([v for v in some if v is not None] or [float("nan")]) for some in values]
    return curves


def _kinds(names) -> dict[str, list[str]]:
    """Return the layers by the last part of their name: q_proj, down_proj, ..."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    return kinds
