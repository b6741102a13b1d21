"""Rewards of chosen and rejected answers while DPO trains, without and with a loss on the chosen ones (chapter 19)."""

import copy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from figures.style import label_end
from figures.toys import Chain, train, trained_on
from minillm.losses import dpo_loss, sequence_log_probs
from minillm.losses.cross_entropy import forward_with_head
from minillm.losses.log_probs import linear_log_probs
from minillm.reports.tracking import read_metrics

V = 16
BETA = 0.1
N_PROMPT, N_REPLY = 4, 12
N_PAIRS, N_STEPS, BATCH = 128, 200, 32
INTERVAL = 4  # steps between two points
SFT_WEIGHTS = (0.0, 1.0)


def compute() -> dict:
    """Return the rewards of two runs: what is preferred are replies with small tokens."""
    chain = Chain(V)
    base, _ = trained_on(chain, n_steps=400)
    generator = torch.Generator().manual_seed(3)
    prompts = chain.texts(N_PAIRS, N_PROMPT, generator)
    replies = torch.stack([chain.continued(prompts, N_REPLY, generator) for _ in range(2)], dim=1)  # (P, 2, T)
    n_small = (replies[:, :, N_PROMPT:] < V // 2).sum(dim=-1)  # (P, 2)
    best = n_small.argmax(dim=1)
    index = torch.arange(N_PAIRS)
    pairs = torch.stack([replies[index, best], replies[index, 1 - best]])  # (2, P, T): chosen, rejected
    return {"runs": [_rewards(base, pairs, weight) for weight in SFT_WEIGHTS]}


def _log_probs(model, ids: Tensor) -> Tensor:
    """Return the log-probability of every reply, (2, P), of ids (2, P, T)."""
    rows = ids.flatten(0, 1)  # (2 P, T)
    targets = rows[:, 1:].clone()
    targets[:, : N_PROMPT - 1] = -100  # the prompt
    batch = {"input_ids": rows[:, :-1], "targets": targets}
    log_probs = forward_with_head(model, batch, partial(linear_log_probs, targets=targets))
    return sequence_log_probs(log_probs, targets)[0].view(2, -1)


def _rewards(base, pairs: Tensor, sft_weight: float) -> dict:
    """Tune a copy of ``base``; return the mean rewards over all pairs."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        reference = _log_probs(model, pairs)
    lengths = torch.full((BATCH,), float(N_REPLY))
    steps, rewards = [], []

    def measure(step: int) -> None:
        if step % INTERVAL == 0:
            with torch.no_grad():
                reward = BETA * (_log_probs(model, pairs) - reference)  # (2, P)
            steps.append(step)
            rewards.append(reward.mean(dim=1).tolist())

    def batches():
        while True:
            yield torch.randint(N_PAIRS, (BATCH,), generator=generator)

    def loss(model, chosen_pairs: Tensor, router_stats) -> tuple[Tensor, Tensor]:
        sides = *_log_probs(model, pairs[:, chosen_pairs]), *reference[:, chosen_pairs]
        options = {"chosen_lengths": lengths, "rejected_lengths": lengths} if sft_weight else {}
        return dpo_loss(*sides, beta=BETA, sft_weight=sft_weight, **options)

    measure(0)
    train(model, batches(), n_steps=N_STEPS, learning_rate=5e-4, loss=loss, after_step=measure)
    chosen, rejected = map(list, zip(*rewards, strict=True))
    return {"sft_weight": sft_weight, "steps": steps, "reward_chosen": chosen, "reward_rejected": rejected}


def from_demo(save_dir: Path) -> dict:
    """Return the rewards of the demo's run on its validation pairs."""
    rows = [row for row in read_metrics(save_dir / "rlhf_128" / "metrics.jsonl") if row["split"] == "valid"]
    columns = {name: [row[name] for row in rows] for name in ("reward_chosen", "reward_rejected")}
    return {"runs": [{"sft_weight": None, "steps": [row["step"] for row in rows], **columns}]}


def draw(figure, numbers, theme) -> None:
    """Draw both rewards and, between them, the margin."""
    figure.set_size_inches(figure.get_figwidth(), 3.3)
    runs = numbers["runs"]
    for axes, run in zip(figure.subplots(1, len(runs), sharey=True, squeeze=False)[0], runs, strict=True):
        steps = run["steps"]
        for n, name in enumerate(("reward_chosen", "reward_rejected")):
            axes.plot(steps, run[name], color=theme.series[n])
            x, y = steps[-1], run[name][-1]
            label_end(axes, x, y, name.removeprefix("reward_"), theme.series[n], annotation_clip=False)
        axes.fill_between(steps, run["reward_chosen"], run["reward_rejected"], color=theme.grid, alpha=0.5, linewidth=0)
        margin = run["reward_chosen"][-1] - run["reward_rejected"][-1]
        middle = (run["reward_chosen"][-1] + run["reward_rejected"][-1]) / 2
        axes.text(steps[-1] * 0.97, middle, f"margin {margin:.1f}", ha="right", va="center")
        axes.axhline(0, color=theme.muted, linewidth=0.8, linestyle="--")
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("step")
        if run["sft_weight"] is not None:
            axes.set_title(f"sft_weight = {run['sft_weight']:g}")
        axes.grid()
    figure.axes[0].set_ylabel("reward")
