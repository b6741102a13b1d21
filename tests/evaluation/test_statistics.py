"""Intervals and tests against scipy's and against enumeration."""

import itertools

import numpy as np
import pytest

from minillm.errors import UserError
from minillm.evaluation.statistics import mcnemar, paired_difference, wilson_interval


@pytest.mark.parametrize(("n_correct", "n"), [(0, 10), (3, 10), (10, 10), (250, 1000), (1, 1)])
def test_wilson_solves_its_equation(n_correct, n):
    """The ends are the shares whose normal test just accepts what was seen: |p̂ − p| = z·sqrt(p(1−p)/n)."""
    low, high = wilson_interval(n_correct, n)
    assert 0 <= low < high <= 1
    for end in (low, high):
        distance = abs(n_correct / n - end)
        assert distance**2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, abs=1e-12)


def test_wilson_of_a_known_example():
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 5), (5, 1), (3, 3), (0, 8)])
def test_mcnemar_equals_the_enumeration(first, second):
    n, fewer = first + second, min(first, second)
    heads = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
    expected = sum(count <= fewer or count >= n - fewer for count in heads) / len(heads)
    assert mcnemar(first, second) == pytest.approx(expected)


def test_mcnemar_of_many_questions():
    assert 0 < mcnemar(1000, 1200) < 1e-4  # 2.0 ** -2200 is 0
    assert mcnemar(1000, 1000) == 1


def test_paired_difference():
    rng = np.random.default_rng(0)
    first = (rng.random(400) < 0.4).tolist()
    second = [a if rng.random() < 0.7 else bool(rng.random() < 0.6) for a in first]
    result = paired_difference(first, second)
    assert result.difference == pytest.approx(np.mean(second) - np.mean(first))
    assert result.low < result.difference < result.high
    # The bootstrap that draws questions, and not their kinds.
    changes = np.array(second, dtype=int) - np.array(first, dtype=int)
    slow = changes[rng.integers(0, 400, size=(10_000, 400))].mean(axis=1)
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=5e-3)
    assert result.p_value == mcnemar(result.only_first, result.only_second)
    opposite = paired_difference(second, first)
    assert (opposite.difference, opposite.p_value) == (-result.difference, result.p_value)


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_bad_input(first, second):
    with pytest.raises(UserError):
        paired_difference(first, second)
    with pytest.raises(UserError):
        wilson_interval(2, 1)
