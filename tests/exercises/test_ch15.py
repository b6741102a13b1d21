"""Exercises of chapter 15: the bytes of ZeRO, and a step over several ranks."""

import pytest
import torch

from minillm.plan import engines
from tests.exercises.kit import exercise, find_the_bug


def library_bytes(n_parameters, *, stage, ranks):
    return engines.zero_bytes(n_parameters, stage=stage, ranks=ranks)


def everything_shared(n_parameters, *, stage, ranks):
    return 16 * n_parameters / (ranks if stage else 1)


def gradients_one_late(n_parameters, *, stage, ranks):
    return library_bytes(n_parameters, stage={2: 1}.get(stage, stage), ranks=ranks)


def weights_stay(n_parameters, *, stage, ranks):
    return library_bytes(n_parameters, stage=min(stage, 2), ranks=ranks)


def always_shared(n_parameters, *, stage, ranks):
    return library_bytes(n_parameters, stage=max(stage, 1), ranks=ranks)


@exercise(
    "ch15_zero",
    solution=library_bytes,
    wrong={
        "shares all at once": (everything_shared, "stage 1 shares the optimizer alone"),
        "gradients in stage 3 only": (gradients_one_late, "stage 2 shares the gradients too"),
        "weights are never shared": (weights_stay, "stage 3 shares the weights too"),
        "stage 0 shares": (always_shared, "stage 0 shares nothing"),
    },
)
def test_zero_bytes(candidate):
    assert candidate(100, stage=0, ranks=4) == pytest.approx(1600), "stage 0 shares nothing: 2 + 2 + 12 bytes"
    assert candidate(100, stage=1, ranks=4) == pytest.approx(700), "stage 1 shares the optimizer alone: 4 + 12/4"
    assert candidate(100, stage=2, ranks=4) == pytest.approx(550), "stage 2 shares the gradients too: 2 + 14/4"
    assert candidate(100, stage=3, ranks=4) == pytest.approx(400), "stage 3 shares the weights too: 16/4"


def right_step_loss(losses_of_ranks):
    return torch.cat(losses_of_ranks).mean()


def finder(step_loss):
    assert float(step_loss([torch.tensor([6.0]), torch.ones(9)])) == pytest.approx(1.5), "ten targets on two ranks"


def one_rank(step_loss):
    assert float(step_loss([torch.tensor([1.0, 2.0, 6.0])])) == pytest.approx(3.0)


def zero_loss(step_loss):
    assert float(step_loss([torch.zeros(2), torch.zeros(3)])) == 0


def mean_of_ranks(step_loss):
    assert float(step_loss([torch.tensor([6.0]), torch.ones(9)])) == pytest.approx(3.5), "expects another fault"


test_find_the_bug = find_the_bug(
    "ch15_bug",
    right=right_step_loss,
    finder=finder,
    hint="it hides with one rank, and in losses of zero",
    wrong={"one rank": one_rank, "losses of zero": zero_loss, "a mean of the ranks' means": mean_of_ranks},
)
