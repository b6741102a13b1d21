"""Next-token cross-entropy, as a sum and a count.

Why a sum: the mean of a step's tokens is not the mean of its micro-batches' means when these hold different
numbers of targets (a mistake that many libraries shipped until late 2024). A loss here never divides; it
returns ``(loss_sum, n_targets)``, and ``Run`` divides once by the count of the *whole* step, over all
micro-batches and all ranks.

Legend: B batch, T positions, D hidden, V vocabulary, N = B·T flattened positions.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.losses.products import kept_dtype, product_dtype, product_for_sums, scaled_gradient

IGNORE_INDEX = -100  # the target of a position where there is nothing to learn

# Logits of one chunk: at most this many numbers (32 Mi × 4 bytes = 128 MiB in float32). Small vocabularies
# fit into one chunk, which costs nothing; at V = 128k a chunk is 256 positions.
CHUNK_NUMEL = 32 * 1024 * 1024


def count_targets(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ weights over the targets that count, a float64 scalar (float32 on mps): a token loss's denominator."""
    counted = targets != IGNORE_INDEX
    wide = torch.float32 if targets.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if weights is None:
        return counted.sum().to(wide)
    return weights.to(wide).masked_fill(~counted, 0.0).sum()


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
    hidden: Tensor, weight: Tensor | None, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``cross_entropy(hidden @ weight.T, targets, weights)`` without ever holding all logits.

    The logits (N, V) are the largest tensor of a small model's training step. Here they exist for one chunk
    of positions at a time. The gradient with respect to the logits is ``w·(softmax − one_hot)``, known as
    soon as the forward pass knows the softmax; so each chunk's contribution to the gradients of ``hidden``
    and ``weight`` is formed at once, and nothing is recomputed in the backward pass. Where no gradient is wanted
    (under ``no_grad``, or of frozen weights) none is formed. Positions without a target are left out of the products
    altogether.

    Args:
        hidden: (..., D). weight: (V, D), the output layer; None: ``hidden`` are logits already, and this is
            ``cross_entropy``. targets, weights: (...), as there.

    Returns:
        ``(loss_sum, n_targets)`` as ``cross_entropy``.
    """
    if weight is None:
        return cross_entropy(hidden, targets, weights)
    hidden = hidden.reshape(-1, hidden.shape[-1])  # (N, D)
    flat_targets = targets.reshape(-1)  # (N,)
    flat_weights = None if weights is None else weights.reshape(-1)
    # Asked here: inside of a Function gradients are always off, and a parameter always asks for its own.
    wants_grad = torch.is_grad_enabled()
    loss_sum = _LinearCrossEntropy.apply(hidden, weight, flat_targets, flat_weights, wants_grad)
    return loss_sum, count_targets(targets, weights)


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
    loss_sum, n_targets = model(
        batch["input_ids"],
        position_ids=batch.get("position_ids"),
        document_ids=batch.get("document_ids"),
        head=partial(linear_cross_entropy, targets=batch["targets"], weights=batch.get("weights")),
        router_stats=router_stats,
    )
    return (loss_sum if router_stats is None else loss_sum + router_stats.finish()), n_targets


class _LinearCrossEntropy(torch.autograd.Function):
    """The chunked product, softmax and gradient behind ``linear_cross_entropy``."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, wants_grad):
        device, dtype = hidden.device.type, product_dtype(hidden)
        need_hidden, need_weight = (wants_grad and need for need in ctx.needs_input_grad[:2])

        rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # (n,) positions that have a target
        everywhere = rows.numel() == targets.numel()
        used = hidden if everywhere else hidden[rows]  # (n, D)
        row_targets = targets if everywhere else targets[rows]
        row_weights = None if weights is None else (weights if everywhere else weights[rows])

        with torch.autocast(device, enabled=False):
            weight_cast = weight.to(dtype)
            acc_dtype = torch.promote_types(dtype, torch.float32)
            loss_sum = torch.zeros((), dtype=acc_dtype, device=hidden.device)
            grad_used = torch.empty_like(used, dtype=kept_dtype(used)) if need_hidden else None
            grad_weight = None
            chunk_len = max(1, CHUNK_NUMEL // weight.shape[0])
            for start in range(0, rows.numel(), chunk_len):
                chunk = slice(start, start + chunk_len)
                chunk_hidden = used[chunk].to(dtype)  # (n, D)
                log_probs = product_for_sums(chunk_hidden, weight_cast.T)  # (n, V), still logits here
                log_probs = F.log_softmax(log_probs, dim=-1)
                chunk_targets = row_targets[chunk, None]  # (n, 1)
                losses = -log_probs.gather(1, chunk_targets).squeeze(1)  # (n,)
                scale = None if row_weights is None else row_weights[chunk].to(acc_dtype)
                loss_sum = loss_sum + (losses.sum() if scale is None else (losses * scale).sum())
                if not (need_hidden or need_weight):
                    continue
                grad_logits = log_probs.exp_()  # (n, V): softmax, in place
                grad_logits.scatter_add_(1, chunk_targets, grad_logits.new_full((), -1.0).expand_as(chunk_targets))
                if scale is not None:
                    grad_logits *= scale[:, None]
                grad_logits = grad_logits.to(dtype)
                if need_hidden:
                    grad_used[chunk] = grad_logits @ weight_cast
                if need_weight:
                    product = product_for_sums(grad_logits.T, chunk_hidden)  # (V, D)
                    grad_weight = product if grad_weight is None else grad_weight.add_(product)

        grad_hidden = grad_used
        if need_hidden and not everywhere:
            grad_hidden = torch.zeros_like(hidden, dtype=kept_dtype(hidden)).index_copy_(0, rows, grad_used)
        if need_weight and grad_weight is None:  # no target at all: exactly zero
            grad_weight = torch.zeros_like(weight)
        if need_weight:  # summed in float32, it is as large as the output weight: not kept wider than needed
            grad_weight = grad_weight.to(kept_dtype(weight))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable  # the saved gradients are constants: differentiating them again would give a wrong answer
    def backward(ctx, grad_loss):
        grads = (scaled_gradient(*each) for each in zip(ctx.saved_tensors, [grad_loss] * 2, ctx.dtypes, strict=True))
        return (*grads, None, None, None)
