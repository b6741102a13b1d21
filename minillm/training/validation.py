"""Validation: the loss on held-out rows, exactly, on any number of ranks; and metrics of the model's own answers."""

import math
from collections.abc import Callable

import torch

from minillm.checkpoints import checkpoint
from minillm.checkpoints.saving import Saver
from minillm.data import StepBatches
from minillm.distributed.engine import Engine
from minillm.losses import next_token_hits
from minillm.objectives.objective import Objective
from minillm.terminal import progress


@torch.no_grad()
def evaluate_loss(
    engine: Engine,
    loader: StepBatches,
    objective: Objective,
    *,
    with_accuracy: bool = False,
    should_stop: Callable[[], int] = lambda: 0,
) -> dict | None:
    """Return ``loss`` (nats per target) over all rows of ``loader``, the objective's measures, and what else is known.

    Returns None if ``should_stop`` says so: a single rank stops at once, several stop together at the end.

    Sums and counts are added over micro-batches and ranks before the one division. With the bytes of the
    targets known, ``bits_per_byte`` = Σ loss / ln 2 / bytes, which compares across tokenizers. With the exact
    log-probabilities of the records known, ``floor`` = −Σ log p / targets: no model can do better on average.

    Args:
        with_accuracy: also return ``accuracy``, the share of targets that the model holds for most probable; it takes
            a second forward pass. Losses of pairs measure theirs themselves.
    """
    counts_hits = with_accuracy and objective.unit == "token"
    module, ranks, measures = engine.module, engine.ranks, objective.measures
    was_training = module.training
    module.eval()
    # Σ loss, Σ targets, ranks that should stop, most probable tokens that are the target, positions with a target
    totals = torch.zeros(5, dtype=engine.sum_dtype, device=engine.device)
    training_sums = measures.swap_sums(None)
    steps = loader.iterate(0, 0, num_workers=0)
    for _, micro_batches in progress(steps, total=loader.steps_per_epoch, desc="validation", enabled=ranks.is_main):
        for batch in objective.prepare(micro_batches, training=False, step=0):
            batch = engine.to_device(batch)
            with engine.autocast():
                loss_sum, n_targets = objective.validation_loss(module, batch)
                n_hits, n_positions = next_token_hits(module, batch) if counts_hits else totals.new_zeros(2)
            totals[:2] += torch.stack([loss_sum.to(totals), n_targets.to(totals)])
            totals[3:] += torch.stack([n_hits.to(totals), n_positions.to(totals)])
        if should_stop() and ranks.world_size == 1:
            break
    totals[2] = should_stop()
    module.train(was_training)
    loss_sum, n_targets, stops, n_hits, n_positions = ranks.sum(totals).tolist()
    result = None
    if not stops:
        result = {"loss": loss_sum / max(n_targets, 1e-12), "n_targets": n_targets}
        if loader.rows.target_bytes:
            result["bits_per_byte"] = loss_sum / math.log(2) / loader.rows.target_bytes
        if loader.rows.log_prob is not None:
            result["floor"] = -loader.rows.log_prob / max(n_targets, 1e-12)
        if counts_hits:
            result["accuracy"] = n_hits / max(n_positions, 1)
        result |= measures.row(ranks)
    measures.swap_sums(training_sums)
    return result


class LossAlone:
    """The metrics of a run that measures nothing but the loss; ``minillm.evaluation.ValidationMetrics`` has the others.

    A script passes its metrics to ``Run.start``, because ``training`` does not import ``evaluation``.
    """

    names: tuple[str, ...] = ("loss",)
    needs_model = False

    def settings(self) -> dict:
        """Return what must match to resume: how the best weights are chosen."""
        return {"eval_metric": "loss"}

    def measure(self, model, ranks) -> tuple[dict[str, float], list[dict]]:
        """Return values by name, and the sample answers."""
        return {}, []


def evaluate_answers(metrics, engine: Engine, saver: Saver) -> tuple[dict[str, float], list[dict]]:
    """Return the values of metrics that need the plain model (its answers), the same on all ranks, and sample answers.

    Where every rank holds the model, ranks share the questions. Where it is sharded, the main rank alone answers, on
    the CPU, with all weights gathered. Neither the mode of the model nor a random generator is different afterwards.
    """
    if not metrics.needs_model:
        return {}, []
    rng_state = checkpoint.rng_state()
    if engine.is_sharded:
        model, device = saver.whole_model(), torch.device("cpu")
    else:
        model, device = saver.model, engine.device
    training_modes = {module: module.training for module in model.modules()} if model is not None else {}

    def measure(ranks):
        with engine.autocast(device):
            return metrics.measure(model, ranks)

    ranks = engine.ranks
    outcome = ranks.on_main_rank(lambda: measure(None)) if engine.is_sharded else measure(ranks)
    for module, mode in training_modes.items():
        module.training = mode
    checkpoint.set_rng_state(rng_state)
    return ranks.gather(outcome)[0]
