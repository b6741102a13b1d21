"""Next-token cross-entropy, as a sum and a count.

Why a sum: the mean of a step's tokens is not the mean of its micro-batches' means when these hold different
numbers of targets (a mistake that many libraries shipped until late 2024). A loss here never divides; it
returns ``(loss_sum, n_targets)``, and ``Step.backward`` divides once by the count of the *whole* step, over all
micro-batches and all ranks.

Legend: B batch, T positions, D hidden, V vocabulary, N = B·T flattened positions.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels.chunked_loss import chunked_loss
from minillm.kernels.linear_cross_entropy import linear_cross_entropy_sum

IGNORE_INDEX = -100  # the target of a position where there is nothing to learn


def count_targets(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ weights over the targets that count, a float64 scalar (float32 on mps): a token loss's denominator."""
    counted = targets != IGNORE_INDEX
    wide = torch.float32 if targets.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if weights is None:
        return counted.sum().to(wide)
    return weights.to(wide).masked_fill(~counted, 0.0).sum()


def positions_with_target(targets: Tensor) -> Tensor:
    """Return (n,): the flattened positions of ``targets`` that have one. On a GPU this synchronises."""
    return (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of given logits.

    Args:
        logits: (..., V), any floating dtype; the softmax is taken in at least float32.
        targets: (...), token ids, already shifted; ``IGNORE_INDEX`` where there is nothing to learn.
        weights: (...), per-target weights, or None for ones.

    Returns:
        ``(loss_sum, n_targets)``: Σ w·(−log p(target)) in nats, and Σ w as float64. Both are exactly zero,
        with zero gradients, when no target counts.
    """
    logits = logits.reshape(-1, logits.shape[-1])  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat_targets = targets.reshape(-1)  # (N,)
    losses = F.cross_entropy(logits, flat_targets, ignore_index=IGNORE_INDEX, reduction="none")  # (N,)
    if weights is not None:
        losses = losses * weights.reshape(-1).to(losses.dtype)
    return losses.sum(), count_targets(targets, weights)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    target_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``cross_entropy(hidden @ weight.T, targets, weights)`` without ever holding all logits.

    The plain expression, with w the weights and -log p in nats, over the n positions that have a target:

        logits = hidden @ weight.T                               # (n, V)
        loss_sum = (w * cross_entropy(logits, targets)).sum()

    The logits are the largest tensor of a small model's training step. ``kernels/linear_cross_entropy.py`` computes
    the same a chunk of positions at a time, and forms a chunk's gradient at once. Where no gradient is wanted (under
    ``no_grad``, or of frozen weights) none is formed.

    Args:
        hidden: (..., D). weight: (V, D), the output layer; None: ``hidden`` are logits already, and this is
            ``cross_entropy``. targets, weights: (...), as there.
        target_positions: (n,), what ``positions_with_target(targets)`` returns, where the batch knows it already.

    Returns:
        ``(loss_sum, n_targets)`` as ``cross_entropy``.
    """
    if weight is None:
        return cross_entropy(hidden, targets, weights)
    loss_sum = linear_cross_entropy_sum(
        hidden.reshape(-1, hidden.shape[-1]),  # (N, D)
        weight,
        targets.reshape(-1),
        None if weights is None else weights.reshape(-1),
        positions_with_target(targets) if target_positions is None else target_positions,
    )
    return loss_sum, count_targets(targets, weights)


def forward_with_head(
    model, batch: dict[str, Tensor], head: Callable, router_stats=None, *, prefix: str = ""
) -> tuple[Tensor, Tensor] | Tensor:
    """Run ``model`` over a batch with ``head`` in place of its output layer; return what the head returns.

    Args:
        head: called inside the model's forward with the hidden states and the output weight.
        prefix: ``other_`` for the second rows of judged replies.
    """
    return model(
        batch[prefix + "input_ids"],
        position_ids=batch.get(prefix + "position_ids"),
        document_ids=batch.get(prefix + "document_ids"),
        document_bounds=batch.get(prefix + "document_bounds"),
        head=head,
        router_stats=router_stats,
    )


@torch.no_grad()
def next_token_hits(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return how many targets of ``batch`` are the model's most probable token, and how many targets there are.

    All targets count alike, whatever they weigh. Of equally probable tokens the one with the lowest id counts. Runs
    inside the model's forward, chunk by chunk, as the loss does.
    """
    targets = batch["targets"].reshape(-1)  # (N,)

    def is_hit(logits: Tensor, chunk_targets: Tensor) -> Tensor:  # (n, V), (n,) → (n,)
        return (logits.argmax(-1) == chunk_targets).to(logits.dtype)

    def head(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        positions = positions_with_target(targets)  # (n,)
        used = hidden.reshape(-1, hidden.shape[-1])[positions]  # (n, D), or (n, V) without a weight
        return chunked_loss(is_hit, used, weight, targets[positions], None), count_targets(targets)

    return forward_with_head(model, batch, head)


def causal_lm_loss(model, batch: dict[str, Tensor], router_stats=None) -> tuple[Tensor, Tensor]:
    """The loss of pretraining and SFT: run ``model`` over ``batch`` with the loss as its output head.

    The loss runs *inside* the model's forward (``head=``), so that wrappers such as DDP, FSDP and ZeRO-3
    see the use of the output weight.

    Args:
        router_stats: what collects the balance and z-loss of a mixture of experts (``minillm.model.RouterStats``);
            None: without them.

    Returns:
        ``(loss_sum, n_targets)`` as ``cross_entropy``, the sum with the routers' losses in it.
    """
    if router_stats is not None:
        router_stats.begin(batch)
    head = partial(
        linear_cross_entropy,
        targets=batch["targets"],
        weights=batch.get("weights"),
        target_positions=batch.get("target_positions"),
    )
    loss_sum, n_targets = forward_with_head(model, batch, head, router_stats)
    return (loss_sum if router_stats is None else loss_sum + router_stats.finish()), n_targets
