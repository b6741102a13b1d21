"""How busy each expert is while a mixture of experts trains, left alone and with the bias (chapter 11)."""

import torch

from figures.toys import Chain, batches_of, new_model, train
from minillm.model import RouterStats
from minillm.model.moe import update_router_bias

V, E, CHOSEN = 32, 8, 2
N_STEPS = 200
INTERVAL = 5  # steps of a point
SPEEDS = (0.0, 0.005)


def compute() -> dict:
    """Return the load of every expert, in units of the mean, over the steps of two runs."""
    ids = Chain(V).texts(32 * N_STEPS, 33, torch.Generator().manual_seed(1))
    return {"steps": list(range(INTERVAL, N_STEPS + 1, INTERVAL)),
            "runs": [{"speed": speed, "loads": _loads(ids, speed)} for speed in SPEEDS]}  # fmt: skip


def _loads(ids, speed: float) -> list[list[float]]:
    """Train, moving the bias at ``speed``; return the loads, a list of steps for each expert."""
    model = new_model(
        V, num_hidden_layers=1, num_experts=E, num_experts_per_tok=CHOSEN, n_shared_experts=1, scoring_func="sigmoid",
        moe_intermediate_size=32,
    )  # fmt: skip
    with torch.no_grad():
        # As in chapter 11: tokens have something in common, so a random router has favourites.
        torch.nn.init.normal_(model.model.layers[0].mlp.gate.weight, std=0.2)
        model.model.embed_tokens.weight += 0.1 * torch.randn(model.config.hidden_size)
    stats = RouterStats(model.config, aux_loss_coef=0.0, z_loss_coef=0.0)
    window, loads = torch.zeros(E, dtype=torch.float64), []

    def after_step(step: int) -> None:
        update_router_bias(model, stats.counts, speed)
        window.add_(stats.counts[0])
        stats.reset()
        if step % INTERVAL == 0:
            loads.append((window / window.mean()).tolist())
            window.zero_()

    train(model, batches_of(ids, 32), n_steps=N_STEPS, learning_rate=4e-3, router_stats=stats, after_step=after_step)
    return list(map(list, zip(*loads, strict=True)))


def draw(figure, numbers, theme) -> None:
    """Draw a line per expert; 1 is its fair share."""
    figure.set_size_inches(figure.get_figwidth(), 3.3)
    highest = max(max(loads) for run in numbers["runs"] for loads in run["loads"])
    for axes, run in zip(figure.subplots(1, 2, sharey=True), numbers["runs"], strict=True):
        for expert, loads in enumerate(run["loads"]):
            axes.plot(numbers["steps"], loads, color=theme.series[expert], linewidth=1.5)
        axes.axhline(1, color=theme.muted, linestyle="--", linewidth=1.2)
        axes.set_title(rf"$\gamma = {run['speed']:g}$")
        axes.set_xlim(0, numbers["steps"][-1])
        axes.set_ylim(0, highest * 1.05)
        axes.set_xlabel("step")
        axes.grid()
    figure.axes[0].set_ylabel("$f_e$", rotation=0, labelpad=10)
