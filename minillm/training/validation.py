"""Validation: the loss on held-out rows, exactly, on any number of ranks."""

import math

import torch

from minillm.terminal import progress


@torch.no_grad()
def evaluate_loss(module, loader, run) -> dict | None:
    """Return ``loss`` (nats per target) over all rows of ``loader``, the run's measures, and what else they allow.

    Returns None if the run was asked to stop by a signal: a single rank stops at once, several at the end together.

    Sums and counts are added over micro-batches and ranks before the one division. With the bytes of the
    targets known, ``bits_per_byte`` = Σ loss / ln 2 / bytes, which compares across tokenizers. With the exact
    log-probabilities of the records known, ``floor`` = −Σ log p / targets: no model can do better on average.
    """
    was_training = module.training
    module.eval()
    totals = torch.zeros(3, dtype=run.sum_dtype, device=run.device)  # Σ loss, Σ targets, signals
    of_training = run.measures.exchange(None)
    steps = loader.iterate(0, 0, num_workers=0)
    bar = {"total": loader.steps_per_epoch, "desc": "validation", "enabled": run.ranks.is_main}
    for _, micro_batches in progress(steps, **bar):
        for batch in run.prepare(micro_batches, False):
            batch = {name: tensor.to(run.device) for name, tensor in batch.items()}
            with run.autocast():
                loss_sum, n_targets = run.loss(module, batch)
            totals[:2] += torch.stack([loss_sum.to(run.sum_dtype), n_targets.to(run.sum_dtype)])
        if run.signals.caught and run.ranks.world_size == 1:
            break
    totals[2] = run.signals.caught
    module.train(was_training)
    loss_sum, n_targets, caught = run.ranks.sum(totals).tolist()
    if caught:
        run.measures.exchange(of_training)
        return None
    result = {"loss": loss_sum / max(n_targets, 1e-12), "n_targets": n_targets}
    if loader.rows.target_bytes:
        result["bits_per_byte"] = loss_sum / math.log(2) / loader.rows.target_bytes
    if loader.rows.log_prob is not None:
        result["floor"] = -loader.rows.log_prob / max(n_targets, 1e-12)
    result |= run.measures.row(run.ranks)
    run.measures.exchange(of_training)
    return result
