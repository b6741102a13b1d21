"""Losses, written by hand. Each returns a sum and the number of things summed; only ``Step.backward`` divides."""

from minillm.losses.cross_entropy import (
    IGNORE_INDEX,
    causal_lm_loss,
    count_targets,
    cross_entropy,
    forward_with_head,
    linear_cross_entropy,
    next_token_hits,
)
from minillm.losses.distill import (
    distill_loss,
    hidden_distance,
    linear_distill_loss,
    linear_top_k_distill_loss,
    top_k_teacher,
)
from minillm.losses.log_probs import linear_log_probs, sequence_log_probs
from minillm.losses.preference import dpo_loss, kto_baseline, kto_loss

__all__ = [
    "IGNORE_INDEX", "causal_lm_loss", "count_targets", "cross_entropy", "distill_loss", "dpo_loss", "forward_with_head",
    "hidden_distance",
    "kto_baseline", "kto_loss", "linear_cross_entropy", "linear_distill_loss", "linear_log_probs",
    "linear_top_k_distill_loss", "next_token_hits", "sequence_log_probs", "top_k_teacher",
]  # fmt: skip
