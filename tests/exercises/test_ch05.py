"""Exercises of chapter 5: the loss, its floor, and a mean that is not one."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import cross_entropy
from tests.exercises.kit import exercise, find_the_bug


def library_mean_loss(logits, targets):
    loss_sum, n_targets = cross_entropy(logits, targets)
    return loss_sum / n_targets.clamp(min=1)


def over_all_positions(logits, targets):
    return cross_entropy(logits, targets)[0] / targets.numel()


def in_bits(logits, targets):
    return library_mean_loss(logits, targets) / math.log(2)


def without_softmax(logits, targets):
    is_target = targets != -100
    return -logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0][is_target].sum() / is_target.sum().clamp(min=1)


def nothing_is_nan(logits, targets):
    loss_sum, n_targets = cross_entropy(logits, targets)
    return loss_sum / n_targets


@exercise(
    "ch05_loss",
    solution=library_mean_loss,
    wrong={
        "divides by all positions": (over_all_positions, "do not count"),
        "bits": (in_bits, "nats"),
        "logits taken for log-probabilities": (without_softmax, "softmax"),
        "nothing to learn": (nothing_is_nan, "no target"),
    },
)
def test_mean_loss(candidate):
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    even = float(candidate(torch.zeros(1, 3, 7), torch.tensor([[1, 2, 3]])))
    assert even != pytest.approx(math.log2(7)), "ln 7 is expected for an even guess: in nats, with ln; log2 gives bits"
    assert even == pytest.approx(math.log(7)), (
        "ln 7 is expected for an even guess: logits become probabilities by softmax"
    )
    expected = float(F.cross_entropy(logits.view(-1, 7), targets.view(-1)))
    assert float(candidate(logits, targets)) == pytest.approx(expected), "the mean of -ln p over all rows and positions"
    targets[0, 2:] = -100
    expected = float(F.cross_entropy(logits.view(-1, 7), targets.view(-1)))
    assert float(candidate(logits, targets)) == pytest.approx(expected), (
        "positions with -100 do not count, above or below"
    )
    assert float(candidate(logits, torch.full_like(targets, -100))) == 0, "with no target the mean is 0, not nan"


@exercise(
    "ch05_entropy",
    solution=lambda p: float(torch.special.entr(p.double()).sum()),
    wrong={
        "bits": (lambda p: float(torch.special.entr(p).sum()) / math.log(2), "nats"),
        "0 · ln 0": (lambda p: float(-(p * p.log()).sum()), "never come"),
        "sign": (lambda p: -float(torch.special.entr(p).sum()), "negative"),
        "no weights": (lambda p: float(-p.log().mean()), "weighted"),
    },
)
def test_entropy(candidate):
    assert float(candidate(torch.tensor([0.5, 0.5]))) >= 0, "entropy is never negative: mind the sign"
    fair = float(candidate(torch.full((8,), 1 / 8)))
    assert fair != pytest.approx(3.0), "an even choice of 8 has ln 8 nats: use ln, log2 gives 3 bits"
    assert float(candidate(torch.tensor([0.9, 0.1]))) == pytest.approx(0.32508, abs=1e-4), "each -ln p is weighted by p"
    assert fair == pytest.approx(math.log(8)), "an even choice of 8 has ln 8 nats"
    with_zero = float(candidate(torch.tensor([0.5, 0.5, 0.0])))
    assert with_zero == pytest.approx(math.log(2)), "tokens that never come add nothing: 0 · ln 0 is 0, not nan"


def right_step_loss(micro_batches):
    losses = torch.cat([losses for losses, _ in micro_batches])
    is_target = torch.cat([mask for _, mask in micro_batches])
    return (losses * is_target).sum() / is_target.sum().clamp(min=1)


def batches(*counts: int) -> list:
    return [(torch.arange(1.0, 7.0) * (i + 1), torch.arange(6) < count) for i, count in enumerate(counts)]


def finder(step_loss):
    one, nine = (torch.tensor([6.0]), torch.tensor([True])), (torch.ones(9), torch.ones(9, dtype=torch.bool))
    assert float(step_loss([one, nine])) == pytest.approx(1.5), "one target of ten"


def equal_counts(step_loss):
    expected = float(right_step_loss(batches(3, 3)))
    assert float(step_loss(batches(3, 3))) == pytest.approx(expected), "equal counts hide it"


def one_micro_batch(step_loss):
    assert float(step_loss(batches(4))) == pytest.approx(2.5), "a single micro-batch hides it"


def mean_of_means(step_loss):
    assert float(step_loss(batches(1, 5))) == pytest.approx((1 + 6) / 2), "expects the fault itself"


test_find_the_bug = find_the_bug(
    "ch05_bug",
    right=right_step_loss,
    finder=finder,
    wrong={"equal counts": equal_counts, "one micro-batch": one_micro_batch, "expects the fault": mean_of_means},
    hint="it hides while all micro-batches have equally many targets",
)
