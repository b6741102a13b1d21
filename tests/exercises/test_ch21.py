"""Exercises of chapter 21: pass@k, a learner by heart, and a weighted mean."""

import pytest
import torch

from minillm.evaluation import pass_at_k
from minillm.losses import cross_entropy
from tests.exercises.kit import exercise, find_the_bug


@exercise(
    "ch21_pass_at_k",
    solution=pass_at_k,
    wrong={
        "with repetition": (lambda n, c, k: 1 - (1 - c / n) ** k, "without repetition"),
        "the share": (lambda n, c, k: c / n, "more samples"),
        "all right": (lambda n, c, k: (c / n) ** k, "at least one"),
        "any": (lambda n, c, k: float(c > 0), "not sure"),
    },
)
def test_estimate(candidate):
    assert float(candidate(5, 0, 3)) == pytest.approx(0), "nothing is right"
    assert float(candidate(4, 1, 1)) == pytest.approx(0.25), "with k below n one right sample is not sure to be drawn"
    two = float(candidate(4, 1, 2))
    assert two != pytest.approx(0.25), "more samples hold a right one more often: k matters"
    assert two > 0.25, "at least one must be right, not all of them"
    assert two == pytest.approx(0.5), (
        "without repetition, 3 of the 6 pairs of samples hold the right one: count sets of k"
    )
    assert float(candidate(5, 3, 3)) == pytest.approx(1), "two wrong ones cannot fill three places"


def by_formula(n_operations, n_seen, n_steps, n_results):
    chain = (1 - (1 - 1 / n_operations) ** n_seen) ** n_steps
    return chain + (1 - chain) / n_results


def never_twice(n_operations, n_seen, n_steps, n_results):
    chain = min(1.0, n_seen / n_operations) ** n_steps
    return chain + (1 - chain) / n_results


def no_guess(n_operations, n_seen, n_steps, n_results):
    return (1 - (1 - 1 / n_operations) ** n_seen) ** n_steps


def one_step(n_operations, n_seen, n_steps, n_results):
    return by_formula(n_operations, n_seen, 1, n_results)


def guess_on_top(n_operations, n_seen, n_steps, n_results):
    return no_guess(n_operations, n_seen, n_steps, n_results) + 1 / n_results


@exercise(
    "ch21_chain",
    solution=by_formula,
    wrong={
        "nothing comes twice": (never_twice, "repetition"),
        "no guesses": (no_guess, "guess"),
        "one step": (one_step, "multiply"),
        "guesses on top": (guess_on_top, "above 1"),
    },
)
def test_expected_accuracy(candidate):
    assert float(candidate(200, 0, 5, 10)) == pytest.approx(0.1), "without knowledge one guess of ten is right"
    assert float(candidate(200, 10**6, 5, 10)) <= 1, "not above 1: only what is not known is guessed"
    assert float(candidate(2, 2, 1, 4)) == pytest.approx(0.75 + 0.25 / 4), (
        "two draws of two operations with repetition show one of them with probability 3/4"
    )
    assert float(candidate(2, 1, 2, 10)) == pytest.approx(0.25 + 0.75 / 10), "the steps' probabilities multiply"
    assert float(candidate(200, 500, 5, 10)) == pytest.approx(0.6876, abs=1e-3), (
        "100 problems of five operations: 0.688"
    )


def right(losses, weights):
    of_zero = losses.double().expm1().log()  # the logit with which a target 1 of logit 0 has just this loss
    logits = torch.stack([of_zero, torch.zeros(len(losses))], dim=-1)
    loss_sum, n_targets = cross_entropy(logits, torch.ones(len(losses), dtype=torch.long), weights)
    return (loss_sum / n_targets).float()  # so that a reader may compare with ==


def finder(weighted_mean):
    losses, weights = torch.full((4,), 2.0), torch.tensor([10.0, 1.0, 1.0, 1.0])
    assert float(weighted_mean(losses, weights)) == pytest.approx(2.0), "the mean of equal losses is that loss"


def equal_weights(weighted_mean):
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert float(weighted_mean(losses, torch.ones(3))) == pytest.approx(3.0), "weights of 1 hide it"


def mean_weight_one(weighted_mean):
    losses, weights = torch.tensor([1.0, 3.0]), torch.tensor([1.5, 0.5])
    assert float(weighted_mean(losses, weights)) == pytest.approx(1.5), "weights that add up to n hide it"


def heavier_counts_more(weighted_mean):
    losses = torch.tensor([5.0, 1.0])
    heavy, light = torch.tensor([10.0, 1.0]), torch.tensor([1.0, 1.0])
    assert weighted_mean(losses, heavy) > weighted_mean(losses, light), "true of both"


def proportional(weighted_mean):
    losses, weights = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    twice = weighted_mean(losses, 2 * weights)
    assert float(twice) == pytest.approx(2 * float(weighted_mean(losses, weights))), "expects the fault itself"


test_find_the_bug = find_the_bug(
    "ch21_bug",
    right=right,
    finder=finder,
    wrong={
        "equal weights": equal_weights,
        "mean weight 1": mean_weight_one,
        "heavier counts more": heavier_counts_more,
        "expects the fault": proportional,
    },
    hint="it hides while all weights are 1, or have the mean 1",
)
