"""Any loss of an output layer's logits, a chunk of positions at a time: the plain expression, and the loop.

Legend: N positions with a target, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.kernels.products import (
    add_product,
    chunks,
    kept_dtype,
    output_operand,
    product_dtype,
    product_in_float32,
    scaled_gradient,
)

# Logits of one chunk (16 MiB in float32): a divergence keeps about ten tensors of this size at a time.
CHUNK_NUMEL = 4 * 1024 * 1024


def chunked_loss(
    loss: Callable, hidden: Tensor, weight: Tensor | None, targets: Tensor, factors: Tensor | None, *others: Tensor
) -> Tensor:
    """Return Σ factor · loss(logits, targets, *others), with logits = hidden Wᵀ never whole.

    The gradients of a chunk are formed at once, by autograd through ``loss`` alone.

    Args:
        loss: takes logits (n, V) of a chunk and the chunk's part of ``targets`` and ``others``; returns (n,).
        hidden: (N, D), or the logits (N, V) themselves where ``weight`` is None. weight: (V, D).
        targets, factors: (N,), factors None for ones. others: (N, ...), without gradient.
    """
    # Must be read here: inside ``Function.forward`` grad mode is always off, and ``ctx.needs_input_grad`` is True for
    # any parameter even under ``no_grad``.
    return _ChunkedLoss.apply(hidden, weight, torch.is_grad_enabled(), loss, targets, factors, *others)


def plain(loss: Callable, hidden: Tensor, weight: Tensor | None, targets: Tensor, factors: Tensor | None, *others):
    """Return the same with all logits at once, as autograd would have it."""
    losses = loss(hidden if weight is None else hidden @ weight.T, targets, *others)  # (N,)
    return losses.sum() if factors is None else (losses * factors).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Sums a loss over chunks of positions, and forms the gradients of each chunk at once."""

    @staticmethod
    def forward(ctx, hidden, weight, wants_grad, loss, targets, factors, *others):
        need_hidden, need_weight = (wants_grad and need for need in ctx.needs_input_grad[:2])
        dtype = product_dtype(hidden)
        wide = torch.promote_types(dtype, torch.float32)
        loss_sum = torch.zeros((), dtype=wide, device=hidden.device)
        grad_dtype = kept_dtype(hidden)
        grad_hidden = torch.zeros_like(hidden, dtype=grad_dtype) if need_hidden else None
        grad_weight = None
        if need_weight:
            grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        short = operand = None
        if weight is not None:
            short, operand = weight.to(dtype), output_operand(weight, dtype)
        n_tokens = (hidden if weight is None else weight.T).shape[-1]
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in chunks(len(hidden), n_tokens, numel=CHUNK_NUMEL, device=hidden.device):
                chunk_hidden = hidden[chunk].to(wide if weight is None else dtype)
                logits = chunk_hidden if weight is None else product_in_float32(chunk_hidden, operand.T)
                with torch.set_grad_enabled(need_hidden or need_weight):
                    logits = logits.detach().to(wide).requires_grad_(need_hidden or need_weight)
                    losses = loss(logits, targets[chunk], *(t[chunk] for t in others))  # (n,)
                    chunk_loss = (losses if factors is None else losses * factors[chunk].to(wide)).sum()
                loss_sum += chunk_loss.detach()
                if not logits.requires_grad:
                    continue
                (grad_logits,) = torch.autograd.grad(chunk_loss, logits)
                grad_logits = grad_logits.to(chunk_hidden.dtype)
                if need_hidden:
                    grad_hidden[chunk] = (grad_logits if weight is None else grad_logits @ short).to(grad_dtype)
                if need_weight:
                    add_product(grad_weight, grad_logits.T, chunk_hidden)
        if need_weight:  # summed in float32, it is as large as the output weight: not kept wider than needed
            grad_weight = grad_weight.to(kept_dtype(weight))
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, None if weight is None else weight.dtype
        return loss_sum

    @staticmethod
    @once_differentiable  # the saved gradients are constants
    def backward(ctx, grad):
        grads = [scaled_gradient(*each) for each in zip(ctx.saved_tensors, [grad] * 2, ctx.dtypes, strict=True)]
        return (*grads, *[None] * (len(ctx.needs_input_grad) - 2))
