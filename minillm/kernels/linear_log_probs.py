"""The log-probabilities of an output layer's targets: the plain expression, and one that never holds all logits.

Unlike the cross-entropy's, each position's gradient has a factor that is not known before the loss of the whole
sequence is; so the backward pass computes the logits of each chunk once more.

Legend: N positions with a target, D hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.kernels.products import add_product, chunks, output_operand, product_dtype, product_in_float32

# Logits of one chunk (16 MiB in float32). Smaller than the cross-entropy's, because the backward pass makes them while
# the activations of the whole model are there.
CHUNK_NUMEL = 4 * 1024 * 1024


def target_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(hidden Wᵀ)[target], (N,), at least float32, from hidden (N, D), weight (V, D), targets (N,).

    Logits are summed in float32 under autocast too: a preference loss takes differences between two models'
    log-probabilities, which are smaller than the steps of a bfloat16 logit.
    """
    return _LinearLogProbs.apply(hidden, weight, targets)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the same with all logits at once, as autograd would have it."""
    return F.log_softmax(hidden @ weight.T, dim=-1).gather(1, targets[:, None]).squeeze(1)


class _LinearLogProbs(torch.autograd.Function):
    """Chunked product and log-softmax; chunked again for the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.dtype = product_dtype(hidden)
        ctx.save_for_backward(hidden, weight, targets)
        found = [hidden.new_empty(0, dtype=torch.promote_types(ctx.dtype, torch.float32))]
        for chunk, _, log_probs in _log_probs(hidden, weight, ctx.dtype):
            found.append(log_probs.gather(1, targets[chunk, None]).squeeze(1))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        short = weight.to(ctx.dtype)
        for chunk, short_hidden, log_probs in _log_probs(hidden, weight, ctx.dtype):
            grad_logits = log_probs.exp_().neg_()  # (n, V): one_hot - softmax, in place
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(targets[chunk, None], dtype=grad.dtype))
            grad_logits = grad_logits.mul_(grad[chunk, None]).to(ctx.dtype)
            if need_hidden:
                grad_hidden[chunk] = (grad_logits @ short).to(hidden.dtype)
            if need_weight:
                add_product(grad_weight, grad_logits.T, short_hidden)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _log_probs(hidden: Tensor, weight: Tensor, dtype: torch.dtype):
    """Yield (slice, hidden states (n, D) in ``dtype``, log-probabilities (n, V)) of every chunk.

    Autocast is off in the loop's body too: it would choose a dtype of its own for the gradients' products.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        operand = output_operand(weight, dtype).T  # (D, V)
        for chunk in chunks(len(hidden), len(weight), numel=CHUNK_NUMEL, device=hidden.device):
            short_hidden = hidden[chunk].to(dtype)
            yield chunk, short_hidden, F.log_softmax(product_in_float32(short_hidden, operand), dim=-1)
