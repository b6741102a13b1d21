"""Log-probabilities of given tokens, and of whole sequences, without ever holding all logits.

Legend: B batch, T positions, D hidden, V vocabulary, N flattened positions with a target, S sequences of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels.linear_log_probs import target_log_probs
from minillm.losses.cross_entropy import IGNORE_INDEX, positions_with_target


def linear_log_probs(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, target_positions: Tensor | None = None
) -> Tensor:
    """Return log p(target) at every position, in nats; exactly 0 where the target is ``IGNORE_INDEX``.

    Like ``linear_cross_entropy`` it works in chunks and leaves out positions without a target
    (``kernels/linear_log_probs.py``).

    Args:
        hidden: (B, T, D). weight: (V, D), the output layer; None: ``hidden`` are logits already.
        targets: (B, T).
        target_positions: (N,), what ``positions_with_target(targets)`` returns, where it is known already.

    Returns:
        (B, T), at least float32.
    """
    if weight is None:
        logits = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return -F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view_as(targets)
    rows = positions_with_target(targets) if target_positions is None else target_positions  # (N,)
    used = hidden.reshape(-1, hidden.shape[-1])[rows]
    found = target_log_probs(used, weight, targets.reshape(-1)[rows])  # (N,)
    return found.new_zeros(targets.numel()).index_put((rows,), found).view_as(targets)


def sequence_log_probs(
    log_probs: Tensor, targets: Tensor, document_ids: Tensor | None = None, n_sequences: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sums of log-probabilities over every sequence of a row, and how many targets each has.

    Args:
        log_probs: (B, T), 0 where there is no target. targets: (B, T).
        document_ids: (B, T), 0, 1, ... within a row, -1 is padding; None: each row is one sequence.
        n_sequences: S, at least the number of documents in the fullest row; None: that number, for which the host
            waits on a GPU.

    Returns:
        ``(sums, lengths)``, (B, S) each; S is at least 1.
    """
    counted = (targets != IGNORE_INDEX).to(log_probs.dtype)
    if document_ids is None:
        return log_probs.sum(dim=1, keepdim=True), counted.sum(dim=1, keepdim=True)
    if n_sequences is None:
        n_sequences = max(1, int(document_ids.max()) + 1)
    # Padding is a sequence of its own behind the others, and cut off.
    place = torch.where(document_ids < 0, n_sequences, document_ids)
    empty = log_probs.new_zeros(len(targets), n_sequences + 1)
    sums, lengths = (empty.scatter_add(1, place, values)[:, :n_sequences] for values in (log_probs, counted))
    return sums, lengths
