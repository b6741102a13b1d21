"""Every shape against its closed form at the steps where a wrong formula shows."""

import math

import pytest
import torch

from minillm.training.schedule import Schedule, schedule_factor

TOTAL, WARMUP, LEAST = 57, 7, 0.1
SPAN = TOTAL - 1 - WARMUP  # steps from the end of the warm-up to the last one

# share between 1 and LEAST, by progress from 0 to 1
STRETCHED = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "polynomial": lambda p: (1 - p) ** 2,
}


def expected(name: str, step: int) -> float:
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / SPAN
    if name in STRETCHED:
        return LEAST + (1 - LEAST) * STRETCHED[name](progress)
    if name == "exponential":
        return LEAST**progress
    if name == "wsd":  # flat, then a straight line to LEAST over the last fifth: 11 steps of 57
        return LEAST + (1 - LEAST) * min(1.0, (TOTAL - 1 - step) / 11)
    return 1.0


NAMES = ["cosine", "linear", "constant", "polynomial", "exponential", "wsd"]


@pytest.mark.parametrize("name", NAMES)
def test_every_step_follows_the_closed_form(name):
    factor = schedule_factor(name, total_steps=TOTAL, warmup_steps=WARMUP, min_ratio=LEAST, decay_ratio=0.2)
    for step in range(TOTAL):
        assert factor(step) == pytest.approx(expected(name, step), abs=1e-12), step


@pytest.mark.parametrize("name", NAMES)
def test_the_corners(name):
    factor = schedule_factor(name, total_steps=TOTAL, warmup_steps=WARMUP, min_ratio=LEAST)
    assert factor(0) == pytest.approx(1 / WARMUP)  # the first update is not lost to a rate of zero
    assert factor(WARMUP - 1) == 1.0  # the peak is reached within the warm-up
    assert factor(WARMUP) == 1.0
    assert factor(TOTAL - 1) == pytest.approx(1.0 if name == "constant" else LEAST)
    values = [factor(step) for step in range(WARMUP, TOTAL)]
    assert values == sorted(values, reverse=True)
    assert factor(TOTAL + 5) <= factor(TOTAL - 1)  # asked past its end, it does not rise or go negative
    assert factor(TOTAL + 5) >= LEAST


def test_the_middle_of_a_cosine_is_halfway():
    factor = schedule_factor("cosine", total_steps=101, min_ratio=0.2)
    assert factor(50) == pytest.approx(0.6)


def test_exponential_without_a_floor_ends_at_a_hundredth():
    factor = schedule_factor("exponential", total_steps=11)
    assert factor(10) == pytest.approx(0.01)
    assert factor(5) == pytest.approx(0.1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 0), (2, 2), (3, 1)])
def test_the_shortest_runs_have_a_rate(name, total, warmup):
    factor = schedule_factor(name, total_steps=total, warmup_steps=warmup, min_ratio=LEAST)
    values = [factor(step) for step in range(total)]
    assert values[0] > 0
    assert all(LEAST - 1e-12 <= value <= 1.0 for value in values)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="zigzag"):
        schedule_factor("zigzag", total_steps=5)(1)


def test_each_group_keeps_its_own_peak():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 2.0}])
    schedule = Schedule(optimizer, lambda step: 1 / (step + 1))
    for step in (0, 3, 1):  # a pure function of the step: the order of the questions does not matter
        assert schedule.set_step(step) == pytest.approx(0.5 / (step + 1))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 / (step + 1), 2.0 / (step + 1)])
