"""Exercises of chapter 29: what a run costs, how a budget is divided, and a utilisation that flatters."""

import pytest

from minillm.plan.flops import Flops, hours
from tests.exercises.kit import exercise, find_the_bug

RUN = {"n_parameters": 1e9, "n_tokens": 20e9, "peak": 3e14, "mfu": 0.4, "n_gpus": 1, "price": 2.0}


def library_price(*, n_parameters, n_tokens, peak, mfu, n_gpus, price):
    flops = Flops(matrices=2 * n_parameters, attention=0, output=0, training=6 * n_parameters, recomputed=0)
    n_hours = hours(flops, n_tokens, peak=peak, mfu=mfu, ranks=n_gpus)
    return n_hours, n_hours * n_gpus * price


def forward_only(**run):
    n_hours, price = library_price(**run)
    return n_hours / 3, price / 3


def one_gpu_is_paid(**run):
    n_hours, _ = library_price(**run)
    return n_hours, n_hours * run["price"]


def more_gpus_no_faster(**run):
    n_hours, price = library_price(**run | {"n_gpus": 1})
    return n_hours, price * run["n_gpus"]


def at_full_peak(**run):
    return library_price(**run | {"mfu": 1.0})


def in_seconds(**run):
    n_hours, _ = library_price(**run)
    return n_hours * 3600, n_hours * 3600 * run["n_gpus"] * run["price"]


@exercise(
    "ch29_price",
    solution=library_price,
    wrong={
        "forward pass only": (forward_only, "backward"),
        "only one GPU is paid": (one_gpu_is_paid, "every GPU"),
        "eight GPUs take as long as one": (more_gpus_no_faster, "share the work"),
        "the peak is reached": (at_full_peak, "mfu"),
        "seconds": (in_seconds, "3,600"),
    },
)
def test_hours_and_price(candidate):
    n_hours, price = candidate(**RUN)
    assert n_hours != pytest.approx(1e6), "that is seconds: an hour has 3,600 of them"
    assert n_hours != pytest.approx(1e6 / 3600 * 0.4), (
        "of the peak, only the share mfu is reached: the run takes longer"
    )
    assert n_hours == pytest.approx(1e6 / 3600), "6 per parameter and token: 2 forward and 4 in the backward pass"
    assert price == pytest.approx(2 * 1e6 / 3600), "one GPU: hours times the price of an hour"
    eight_hours, eight_price = candidate(**RUN | {"n_gpus": 8})
    assert eight_hours == pytest.approx(n_hours / 8), "eight GPUs share the work"
    assert eight_price == pytest.approx(price), "every GPU is paid: an eighth of the hours on eight GPUs costs the same"


FIT = {"a": 482.01, "alpha": 0.3478, "b": 2085.43, "beta": 0.3658}


def right_split(compute, *, a, alpha, b, beta):
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = g * (compute / 6) ** (beta / (alpha + beta))
    return n, compute / 6 / n


def without_six(compute, **fit):
    return right_split(6 * compute, **fit)


def rule_of_twenty(compute, **fit):
    n = (compute / 120) ** 0.5
    return n, 20 * n


def exponents_swapped(compute, *, a, alpha, b, beta):
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    n = g * (compute / 6) ** (alpha / (alpha + beta))
    return n, compute / 6 / n


def equal_terms(compute, *, a, alpha, b, beta):
    n = (a / b) ** (1 / (alpha + beta)) * (compute / 6) ** (beta / (alpha + beta))
    return n, compute / 6 / n


@exercise(
    "ch29_split",
    solution=right_split,
    wrong={
        "compute is ND": (without_six, "6ND"),
        "twenty, whatever the fit": (rule_of_twenty, "this fit"),
        "exponents swapped": (exponents_swapped, "smaller loss"),
        "both terms made equal": (equal_terms, "smaller loss"),
    },
)
def test_best_split(candidate):
    fits = [(1e20, FIT), (1e23, FIT), (1e21, {"a": 400.0, "alpha": 0.34, "b": 400.0, "beta": 0.28})]
    for compute, fit in fits:
        n, d = map(float, candidate(compute, **fit))
        assert 6 * n * d == pytest.approx(compute, rel=1e-6), "the whole budget is spent: 6ND = compute"

        def loss(n, compute=compute, fit=fit):
            return fit["a"] / n ** fit["alpha"] + fit["b"] / (compute / 6 / n) ** fit["beta"]

        assert d / n != pytest.approx(20, rel=1e-6), "20 per parameter is a rule of thumb: take the best of this fit"
        is_least = loss(n) < min(loss(0.99 * n), loss(1.01 * n))
        assert is_least, "1 % more or fewer parameters give a smaller loss: where is the derivative 0?"


def right_mfu(tokens_per_s, *, n_parameters, peak, recomputes):
    return tokens_per_s * 6 * n_parameters / peak


MACHINE = {"n_parameters": 1e9, "peak": 3e14}


def finder(mfu):
    without = mfu(10_000, **MACHINE, recomputes=False)
    assert mfu(10_000, **MACHINE, recomputes=True) == without, "the same speed is the same MFU, recomputed or not"


def by_hand_without(mfu):
    assert mfu(10_000, **MACHINE, recomputes=False) == pytest.approx(0.2)


def twice_as_fast(mfu):
    slow, fast = (mfu(speed, **MACHINE, recomputes=True) for speed in (5_000, 10_000))
    assert fast == pytest.approx(2 * slow)


def below_one(mfu):
    assert 0 < mfu(10_000, **MACHINE, recomputes=True) < 1


def must_fall(mfu):
    assert mfu(10_000, **MACHINE, recomputes=True) < mfu(10_000, **MACHINE, recomputes=False)


test_find_the_bug = find_the_bug(
    "ch29_bug",
    right=right_mfu,
    finder=finder,
    wrong={
        "by hand, without recomputation": by_hand_without,
        "twice as fast": twice_as_fast,
        "below one": below_one,
        "must fall": must_fall,
    },
    hint="it hides without recomputation, and in the ratio of two runs that both recompute",
)
