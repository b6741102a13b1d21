"""Exercises of chapter 14: bfloat16's dead zone, the search for a loss scale, the order of unscaling and clipping."""

import math

import pytest
import torch

from minillm import precision
from tests.exercises.kit import exercise, find_the_bug


def half_spacing(weight):
    return 2.0 ** (math.floor(math.log2(abs(weight))) - 8)


@exercise(
    "ch14_deadzone",
    solution=half_spacing,
    wrong={
        "the same everywhere": (lambda w: 2.0**-8, "grows with the size"),
        "the whole spacing": (lambda w: 2 * half_spacing(w), "half of the spacing"),
        "relative": (lambda w: abs(w) * 2.0**-8, "same between 1 and 2"),
        "float16": (lambda w: half_spacing(w) / 8, "7 bits"),
        "sign": (lambda w: math.copysign(half_spacing(w), w), "negative"),
    },
)
def test_dead_zone(candidate):
    at_one = candidate(1.0)
    assert at_one != 2.0**-7, "at 1 it is half of the spacing, 2^-8: rounding goes to the nearest number"
    assert at_one == 2.0**-8, "at 1 it is 2^-8, for 7 bits of fraction"
    assert candidate(1.75) == 2.0**-8, "the spacing is the same between 1 and 2"
    assert candidate(3.0) == 2.0**-7, "the spacing grows with the size of the weight: twice as wide from 2 on"
    assert candidate(-0.02) == 2.0**-14, "for a negative weight its size counts"
    for weight in (0.0201, 0.7, 5.0):
        stored = torch.tensor(weight).bfloat16()
        limit = candidate(stored.item())
        assert stored + torch.tensor(0.99 * limit).bfloat16() == stored, f"0.99 of it does not move {weight}"
        assert stored + torch.tensor(1.02 * limit).bfloat16() != stored, f"1.02 of it moves {weight}"


def library_scale(scale, n_good, is_finite, *, interval=2000):
    scaler = precision.grad_scaler(torch.device("cpu"), torch.float16)
    state = scaler.state_dict() | {"scale": scale, "growth_interval": interval, "_growth_tracker": n_good}
    scaler.load_state_dict(state)
    weight = torch.nn.Parameter(torch.ones(1))
    scaler.scale(weight.sum() * (1.0 if is_finite else float("inf"))).backward()
    scaler.step(torch.optim.SGD([weight], lr=0.0))
    scaler.update()
    return scaler.get_scale(), scaler.state_dict()["_growth_tracker"]


def never_grows(scale, n_good, is_finite, *, interval=2000):
    return (scale, n_good + 1) if is_finite else (scale / 2, 0)


def overflow_keeps_count(scale, n_good, is_finite, *, interval=2000):
    return library_scale(scale, n_good, True, interval=interval) if is_finite else (scale / 2, n_good)


def one_late(scale, n_good, is_finite, *, interval=2000):
    if not is_finite:
        return scale / 2, 0
    return (scale * 2, 0) if n_good == interval else (scale, n_good + 1)


def growth_keeps_count(scale, n_good, is_finite, *, interval=2000):
    if not is_finite:
        return scale / 2, 0
    return (scale * 2 if n_good + 1 >= interval else scale), n_good + 1


@exercise(
    "ch14_scaler",
    solution=library_scale,
    wrong={
        "never grows": (never_grows, "3rd good update in a row"),
        "an overflow is no break": (overflow_keeps_count, "starts over after an overflow"),
        "one update late": (one_late, "3rd good update in a row"),
        "doubles again at once": (growth_keeps_count, "starts over after doubling"),
    },
)
def test_next_scale(candidate):
    assert candidate(1024.0, 0, True, interval=3) == (1024.0, 1), "one good update is counted, and changes nothing yet"
    assert candidate(1024.0, 1, False, interval=3)[0] == 512.0, "an overflow halves the scale"
    assert candidate(1024.0, 1, False, interval=3)[1] == 0, "the count starts over after an overflow"
    assert candidate(1024.0, 2, True, interval=3)[0] == 2048.0, "the 3rd good update in a row doubles it (interval 3)"
    assert candidate(1024.0, 2, True, interval=3)[1] == 0, "the count starts over after doubling"


def right_order(scaled_gradient, scale, max_norm):
    gradient = scaled_gradient / scale
    return gradient * min(1.0, max_norm / (float(gradient.norm()) + 1e-6))


def finder(unscale_and_clip):
    gradient = unscale_and_clip(torch.tensor([0.3, 0.4]) * 65536, 65536.0, 1.0)
    assert torch.allclose(gradient, torch.tensor([0.3, 0.4])), "a true norm of 0.5 needs no clipping to 1"


def scale_of_one(unscale_and_clip):
    assert torch.allclose(unscale_and_clip(torch.tensor([3.0, 4.0]), 1.0, 1.0), torch.tensor([0.6, 0.8]))


def at_most_the_limit(unscale_and_clip):
    assert float(unscale_and_clip(torch.tensor([3.0, 4.0]) * 65536, 65536.0, 1.0).norm()) <= 1.0001


def only_the_direction(unscale_and_clip):
    gradient = unscale_and_clip(torch.tensor([3.0, 4.0]) * 65536, 65536.0, 1.0)
    assert float(gradient[0] / gradient[1]) == pytest.approx(0.75)


test_find_the_bug = find_the_bug(
    "ch14_bug",
    right=right_order,
    finder=finder,
    hint="it hides with a scale of 1, in the direction, and where the scaled norm is within the limit too",
    wrong={"scale 1": scale_of_one, "at most the limit": at_most_the_limit, "direction": only_the_direction},
)
