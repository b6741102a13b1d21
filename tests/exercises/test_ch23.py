"""Exercises of chapter 23: a choice, an interval, and a likelihood one place off."""

import math

import pytest
import torch

from minillm.evaluation.multiple_choice import ScoredQuestion
from minillm.evaluation.statistics import wilson_interval
from tests.exercises.kit import exercise, find_the_bug


def library_choose(log_likelihoods, choices):
    n_bytes = [len(choice.encode()) for choice in choices]
    sizes = {"n_tokens": [1] * len(choices), "n_bytes": n_bytes}
    return ScoredQuestion(id="", subject="", answer=0, log_likelihoods=log_likelihoods, **sizes).choice_per_byte


def highest_sum(log_likelihoods, choices):
    return log_likelihoods.index(max(log_likelihoods))


def per_character(log_likelihoods, choices):
    means = [value / len(choice) for value, choice in zip(log_likelihoods, choices, strict=True)]
    return means.index(max(means))


def lowest(log_likelihoods, choices):
    means = [value / len(choice.encode()) for value, choice in zip(log_likelihoods, choices, strict=True)]
    return means.index(min(means))


def times_length(log_likelihoods, choices):
    values = [value * len(choice.encode()) for value, choice in zip(log_likelihoods, choices, strict=True)]
    return values.index(max(values))


@exercise(
    "ch23_choice",
    solution=library_choose,
    wrong={
        "the sum": (highest_sum, "short"),
        "per character": (per_character, "3 bytes"),
        "the least probable": (lowest, "nearest to 0"),
        "multiplied": (times_length, "short"),
    },
)
def test_choose_per_byte(candidate):
    assert candidate([-8.0, -4.0], ["aaaa", "bbbb"]) == 1, "log-likelihoods are negative: the best one is nearest to 0"
    assert candidate([-6.0, -10.0], ["ab", "abcdefghij"]) == 1, "-1 a byte beats -3; the sum prefers what is short"
    assert candidate([-6.0, -4.5], ["蓝色", "abcd"]) == 0, "蓝 and 色 have 3 bytes each: count bytes, not characters"


def simple(n_correct, n, z=1.96):
    p = n_correct / n
    half = z * math.sqrt(p * (1 - p) / n)
    return p - half, p + half


def with_deviation_of_one_answer(n_correct, n, z=1.96):
    p = n_correct / n
    return p - z * math.sqrt(p * (1 - p)), p + z * math.sqrt(p * (1 - p))


def without_the_shift(n_correct, n, z=1.96):
    low, high = wilson_interval(n_correct, n, z=z)
    return n_correct / n - (high - low) / 2, n_correct / n + (high - low) / 2


@exercise(
    "ch23_wilson",
    solution=lambda n_correct, n, z=1.96: wilson_interval(n_correct, n, z=z),
    wrong={
        "the textbook's": (simple, "no width"),
        "not divided by n": (with_deviation_of_one_answer, "sqrt"),
        "centred on the share": (without_the_shift, "between 0 and 1"),
        "one standard deviation": (lambda k, n, z=1.96: wilson_interval(k, n, z=1), "1.96"),
    },
)
def test_wilson(candidate):
    low, high = candidate(5000, 10000)
    assert high - low < 0.1, "with 10,000 questions the interval is narrow: the deviation of a mean falls with sqrt(n)"
    assert high - low == pytest.approx(0.0196, abs=1e-4), "the half width is z = 1.96 deviations"
    low, high = candidate(0, 10)
    assert high > 0.05, "no right answer of 10 does not prove a share of 0: an interval with no width is wrong"
    assert low > -1e-9, "a share lies between 0 and 1; Wilson's centre is not the share itself, it is nearer to 1/2"
    assert high == pytest.approx(1.96**2 / (10 + 1.96**2)), "with no right answer the upper end is z² / (n + z²)"
    assert candidate(60, 100) == pytest.approx(wilson_interval(60, 100, z=1.96)), "of 60 right answers to 100"
    assert candidate(60, 100, z=1) == pytest.approx(wilson_interval(60, 100, z=1)), "z is an argument, not always 1.96"


def right_log_likelihood(log_probs, ids, first):
    return float(sum(log_probs[t - 1, ids[t]] for t in range(first, len(ids))))


def finder(log_likelihood):
    log_probs = torch.tensor([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3]]).log()
    assert log_likelihood(log_probs, [0, 1, 0], 1) == pytest.approx(math.log(0.9 * 0.4)), "row t predicts token t + 1"


def even_model(log_likelihood):
    log_probs = torch.full((3, 4), -math.log(4))
    assert log_likelihood(log_probs, [0, 1, 2], 1) == pytest.approx(-2 * math.log(4)), "all rows alike hide it"


def negative(log_likelihood):
    assert log_likelihood(torch.randn(4, 5).log_softmax(-1), [0, 1, 2, 3], 2) < 0


def same_rows(log_likelihood):
    log_probs = torch.tensor([[0.1, 0.9]]).expand(3, 2).log()
    assert log_likelihood(log_probs, [0, 1, 1], 1) == pytest.approx(2 * math.log(0.9))


def expects_the_fault(log_likelihood):
    log_probs = torch.tensor([[0.1, 0.9], [0.4, 0.6]]).log()
    assert log_likelihood(log_probs, [0, 1], 1) == pytest.approx(math.log(0.6))


test_find_the_bug = find_the_bug(
    "ch23_bug",
    right=right_log_likelihood,
    finder=finder,
    wrong={
        "an even model": even_model,
        "only the sign": negative,
        "the same row everywhere": same_rows,
        "expects the fault": expects_the_fault,
    },
    hint="it hides while all rows of log_probs are alike",
)
