"""The learning rate as a function of the step: warm-up, then one of six shapes.

A schedule is a pure function of the step number, so a resumed run needs only its step to go on exactly.
"""

import math
from collections.abc import Callable

import torch


def schedule_factor(
    name: str, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0, decay_ratio: float = 0.2
) -> Callable[[int], float]:
    """Return ``factor(step)``: the share of the peak learning rate used by update number ``step`` (from 0).

    During the warm-up it grows linearly: ``(step + 1) / warmup_steps``, so the first update is not lost to a
    rate of zero. After it, with progress p from 0 (first step after the warm-up) to 1 (the last step):

    - ``cosine``: (1 + cos πp) / 2 (Loshchilov & Hutter, SGDR, 2017, eq. 5, without restarts)
    - ``linear``: 1 − p
    - ``polynomial``: (1 − p)²
    - ``exponential``: min_ratio^p (0.01^p when min_ratio is 0)
    - ``wsd``: 1, then linear over the last ``decay_ratio`` of all steps (Hu et al., MiniCPM, 2024, section 4)
    - ``constant``: 1; ``min_ratio`` does not apply

    The others are stretched between 1 and ``min_ratio``.
    """
    decay_steps = max(1, round(decay_ratio * total_steps))

    def shape(step: int, progress: float) -> float:
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if name == "linear":
            return 1 - progress
        if name == "polynomial":
            return (1 - progress) ** 2
        if name == "wsd":
            return min(1.0, (total_steps - 1 - step) / decay_steps)
        raise ValueError(f"unknown schedule: {name}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        span = max(1, total_steps - 1 - warmup_steps)
        progress = min(1.0, (step - warmup_steps) / span)
        if name == "exponential":
            return (min_ratio or 0.01) ** progress
        return min_ratio + (1 - min_ratio) * max(0.0, shape(step, progress))

    return factor


class Schedule:
    """Sets an optimizer's learning rates to their peak × ``factor(step)``; each group keeps its own peak."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]):
        self.optimizer, self.factor = optimizer, factor
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set_step(self, step: int) -> float:
        """Set the learning rates for update number ``step`` and return the first group's."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(step)
        return self.optimizer.param_groups[0]["lr"]
