"""Validation: the loss on held-out rows, exactly, on any number of ranks."""

import math
from collections.abc import Callable

import torch

from minillm.data import StepBatches
from minillm.distributed.engine import Engine
from minillm.objectives.objective import Objective
from minillm.terminal import progress


@torch.no_grad()
def evaluate_loss(
    engine: Engine, loader: StepBatches, objective: Objective, *, should_stop: Callable[[], int] = lambda: 0
) -> dict | None:
    """Return ``loss`` (nats per target) over all rows of ``loader``, the objective's measures, and what else is known.

    Returns None if ``should_stop`` says so: a single rank stops at once, several stop together at the end.

    Sums and counts are added over micro-batches and ranks before the one division. With the bytes of the
    targets known, ``bits_per_byte`` = Σ loss / ln 2 / bytes, which compares across tokenizers. With the exact
    log-probabilities of the records known, ``floor`` = −Σ log p / targets: no model can do better on average.
    """
    module, ranks, measures = engine.module, engine.ranks, objective.measures
    was_training = module.training
    module.eval()
    totals = torch.zeros(3, dtype=engine.sum_dtype, device=engine.device)  # Σ loss, Σ targets, ranks that should stop
    training_sums = measures.swap_sums(None)
    steps = loader.iterate(0, 0, num_workers=0)
    for _, micro_batches in progress(steps, total=loader.steps_per_epoch, desc="validation", enabled=ranks.is_main):
        for batch in objective.prepare(micro_batches, training=False, step=0):
            batch = engine.to_device(batch)
            with engine.autocast():
                loss_sum, n_targets = objective.validation_loss(module, batch)
            totals[:2] += torch.stack([loss_sum.to(totals), n_targets.to(totals)])
        if should_stop() and ranks.world_size == 1:
            break
    totals[2] = should_stop()
    module.train(was_training)
    loss_sum, n_targets, stops = ranks.sum(totals).tolist()
    result = None
    if not stops:
        result = {"loss": loss_sum / max(n_targets, 1e-12), "n_targets": n_targets}
        if loader.rows.target_bytes:
            result["bits_per_byte"] = loss_sum / math.log(2) / loader.rows.target_bytes
        if loader.rows.log_prob is not None:
            result["floor"] = -loader.rows.log_prob / max(n_targets, 1e-12)
        result |= measures.row(ranks)
    measures.swap_sums(training_sums)
    return result
