"""Losses, written by hand. Each returns a sum and the number of things summed; only ``Run`` divides."""

from minillm.losses.cross_entropy import (
    IGNORE_INDEX,
    causal_lm_loss,
    count_targets,
    cross_entropy,
    linear_cross_entropy,
)

__all__ = ["IGNORE_INDEX", "causal_lm_loss", "count_targets", "cross_entropy", "linear_cross_entropy"]
