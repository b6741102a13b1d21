"""Log-probabilities of given tokens, and of whole sequences, without ever holding all logits.

Legend: B batch, T positions, D hidden, V vocabulary, N flattened positions with a target, S sequences of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minillm.losses.cross_entropy import IGNORE_INDEX
from minillm.losses.products import output_operand, product_dtype, product_for_sums, product_in_float32

# Logits of one chunk (16 MiB in float32). Smaller than the cross-entropy's, because the backward pass makes them while
# the activations of the whole model are there.
CHUNK_NUMEL = 4 * 1024 * 1024


def linear_log_probs(hidden: Tensor, weight: Tensor | None, targets: Tensor) -> Tensor:
    """Return log p(target) at every position, in nats; exactly 0 where the target is ``IGNORE_INDEX``.

    Like ``linear_cross_entropy`` it works in chunks and leaves out positions without a target. Unlike there, each
    position's gradient has a factor that is not known before the loss of the whole sequence is; so the backward pass
    computes the logits of each chunk once more. Logits are summed in float32 under autocast too: a preference loss
    takes differences between two models' log-probabilities, which are smaller than the steps of a bfloat16 logit.

    Args:
        hidden: (B, T, D). weight: (V, D), the output layer; None: ``hidden`` are logits already.
        targets: (B, T).

    Returns:
        (B, T), at least float32.
    """
    if weight is None:
        logits = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    rows = (targets.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)  # (N,)
    used = hidden.reshape(-1, hidden.shape[-1])[rows]
    found = _LinearLogProbs.apply(used, weight, targets.reshape(-1)[rows])  # (N,)
    return found.new_zeros(targets.numel()).index_put((rows,), found).view_as(targets)


def sequence_log_probs(log_probs: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums of log-probabilities over every sequence of a row, and how many targets each has.

    Args:
        log_probs: (B, T), 0 where there is no target. targets: (B, T).
        document_ids: (B, T), 0, 1, ... within a row, -1 is padding; None: each row is one sequence.

    Returns:
        ``(sums, lengths)``, (B, S) each; S is the number of documents in the fullest row, at least 1.
    """
    counted = (targets != IGNORE_INDEX).to(log_probs.dtype)
    if document_ids is None:
        return log_probs.sum(dim=1, keepdim=True), counted.sum(dim=1, keepdim=True)
    n_sequences = max(1, int(document_ids.max()) + 1)
    # Padding is a sequence of its own behind the others, and cut off.
    place = torch.where(document_ids < 0, n_sequences, document_ids)
    empty = log_probs.new_zeros(len(targets), n_sequences + 1)
    sums, lengths = (empty.scatter_add(1, place, values)[:, :n_sequences] for values in (log_probs, counted))
    return sums, lengths


class _LinearLogProbs(torch.autograd.Function):
    """Chunked product and log-softmax; chunked again for the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        ctx.dtype = product_dtype(hidden)
        ctx.save_for_backward(hidden, weight, targets)
        found = [hidden.new_empty(0, dtype=torch.promote_types(ctx.dtype, torch.float32))]
        for chunk, _, log_probs in _chunks(hidden, weight, ctx.dtype):
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
        for chunk, short_hidden, log_probs in _chunks(hidden, weight, ctx.dtype):
            grad_logits = log_probs.exp_().neg_()  # (n, V): one_hot - softmax, in place
            grad_logits.scatter_add_(1, targets[chunk, None], torch.ones_like(targets[chunk, None], dtype=grad.dtype))
            grad_logits = grad_logits.mul_(grad[chunk, None]).to(ctx.dtype)
            if need_hidden:
                grad_hidden[chunk] = (grad_logits @ short).to(hidden.dtype)
            if need_weight:
                grad_weight += product_for_sums(grad_logits.T, short_hidden)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunks(hidden: Tensor, weight: Tensor, dtype: torch.dtype):
    """Yield (slice, hidden states (n, D) in ``dtype``, log-probabilities (n, V)) of every chunk.

    Autocast is off in the loop's body too: it would choose a dtype of its own for the gradients' products.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        operand = output_operand(weight, dtype).T  # (D, V)
        length = max(1, CHUNK_NUMEL // len(weight))
        for start in range(0, len(hidden), length):
            chunk = slice(start, start + length)
            short_hidden = hidden[chunk].to(dtype)
            log_probs = F.log_softmax(product_in_float32(short_hidden, operand), dim=-1)
            yield chunk, short_hidden, log_probs
