"""The cross-entropy of an output layer: the plain expression, and one that never holds all logits.

The logits (N, V) are the largest tensor of a small model's training step. Here they exist for one chunk of positions at
a time. The gradient with respect to the logits is ``w·(softmax − one_hot)``, known as soon as the forward pass knows
the softmax; so each chunk's part of the gradients of ``hidden`` and ``weight`` is formed at once, and nothing is
recomputed in the backward pass.

Legend: N positions, n of them with a target, c of these in a chunk, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.kernels.products import add_product, chunks, kept_dtype, product_dtype, product_for_sums, scaled_gradient

# Logits of one chunk: at most this many numbers (32 Mi × 4 bytes = 128 MiB in float32). Small vocabularies
# fit into one chunk, which costs nothing; on a CPU a chunk is 256 positions at V = 128k.
CHUNK_NUMEL = 32 * 1024 * 1024


def linear_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, positions: Tensor
) -> Tensor:
    """Return Σ w·(−log softmax(hidden Wᵀ)[target]) over the positions ``positions``; the others cost nothing.

    Args:
        hidden: (N, D). weight: (V, D). targets, weights: (N,). positions: (n,) positions that have a target, ascending.
    """
    # Must be read here: inside ``Function.forward`` grad mode is always off, and ``ctx.needs_input_grad`` is True for
    # any parameter even under ``no_grad``.
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, positions, torch.is_grad_enabled())


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, positions: Tensor) -> Tensor:
    """Return the same with all logits at once, as autograd would have it."""
    losses = F.cross_entropy(hidden[positions] @ weight.T, targets[positions], reduction="none")  # (n,)
    return losses.sum() if weights is None else (losses * weights[positions]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The chunked product, softmax and gradient behind ``linear_cross_entropy_sum``."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, positions, wants_grad):
        dtype = product_dtype(hidden)
        need_hidden, need_weight = (wants_grad and need for need in ctx.needs_input_grad[:2])

        everywhere = positions.numel() == targets.numel()
        used = hidden if everywhere else hidden[positions]  # (n, D)
        used_targets = targets if everywhere else targets[positions]
        used_weights = None if weights is None else (weights if everywhere else weights[positions])

        with torch.autocast(hidden.device.type, enabled=False):
            weight_cast = weight.to(dtype)
            acc_dtype = torch.promote_types(dtype, torch.float32)
            loss_sum = torch.zeros((), dtype=acc_dtype, device=hidden.device)
            grad_used = torch.empty_like(used, dtype=kept_dtype(used)) if need_hidden else None
            grad_weight = None
            for chunk in chunks(positions.numel(), weight.shape[0], numel=CHUNK_NUMEL, device=hidden.device):
                chunk_hidden = used[chunk].to(dtype)  # (c, D)
                logits = product_for_sums(chunk_hidden, weight_cast.T)  # (c, V)
                log_probs = F.log_softmax(logits, dim=-1)
                del logits
                chunk_targets = used_targets[chunk, None]  # (c, 1)
                losses = -log_probs.gather(1, chunk_targets).squeeze(1)  # (c,)
                scale = None if used_weights is None else used_weights[chunk].to(acc_dtype)
                loss_sum = loss_sum + (losses.sum() if scale is None else (losses * scale).sum())
                if not (need_hidden or need_weight):
                    continue
                grad_logits = log_probs.exp_()  # (c, V): softmax, in place
                grad_logits.scatter_add_(1, chunk_targets, grad_logits.new_full((), -1.0).expand_as(chunk_targets))
                if scale is not None:
                    grad_logits *= scale[:, None]
                grad_logits = grad_logits.to(dtype)
                if need_hidden:
                    grad_used[chunk] = grad_logits @ weight_cast
                if need_weight:
                    grad_weight = add_product(grad_weight, grad_logits.T, chunk_hidden)  # (V, D)

        grad_hidden = grad_used
        if need_hidden and not everywhere:
            grad_hidden = torch.zeros_like(hidden, dtype=kept_dtype(hidden)).index_copy_(0, positions, grad_used)
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
        return (*grads, None, None, None, None)
