"""How far a score may be from the truth: an interval for one share, and two tests for the difference of two models.

Models are compared on the same questions, so only the questions that exactly one of them answers right tell anything.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minillm.errors import UserError

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


class PairedDifference(NamedTuple):
    """The accuracy of the second model minus that of the first, on the same questions."""

    difference: float
    low: float
    """Lower end of the 95 % interval of a paired bootstrap."""
    high: float
    only_first: int
    """Questions that only the first model answers right."""
    only_second: int
    p_value: float
    """McNemar's exact test, two-sided."""


def wilson_interval(n_correct: int, n: int, *, z: float = Z_95) -> tuple[float, float]:
    """Return the interval of a share, 95 % by default (Wilson, Probable Inference, 1927).

    Unlike ``p ± z·sqrt(p(1−p)/n)`` it stays within 0 and 1 and has a width when all or no answers are right.

    Raises:
        UserError: ``n`` is not positive or ``n_correct`` is not between 0 and ``n``.
    """
    if not 0 <= n_correct <= n or n < 1:
        raise UserError(f"{n_correct} right of {n} questions: give 0 to n of at least 1 question")
    share, weight = n_correct / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: the smaller count as heads of fair coins.

    Args:
        only_first: questions that only the first model answers right. only_second: likewise.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Exact integers: a float power of two would be 0 for many questions.
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(
    first: Sequence[bool], second: Sequence[bool], *, n_resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Return the difference of two models' accuracies on the same questions, in the same order.

    Raises:
        UserError: different numbers of questions, or none.
    """
    if len(first) != len(second) or not first:
        raise UserError(f"{len(first)} and {len(second)} questions: give the same questions, at least one")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    n = len(first)
    # A resample of n questions holds this many of the three kinds: only first, only second, no difference.
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    counts = np.random.default_rng(seed).multinomial(n, shares, size=n_resamples)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / n, [0.025, 0.975])
    return PairedDifference(
        difference=(only_second - only_first) / n,
        low=float(low),
        high=float(high),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )
