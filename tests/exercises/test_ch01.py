"""Exercises of chapter 1: the numbers that a run prints."""

import math

import pytest

from tests.exercises.kit import exercise, find_the_bug

TEXT = "猫 sat"  # 7 bytes, 5 characters


def right_bits(loss, n_targets, text):
    return loss * n_targets / len(text.encode("utf-8")) / math.log(2)


@exercise(
    "ch01_bits",
    solution=right_bits,
    wrong={
        "nats": (lambda loss, n, text: loss * n / len(text.encode()), "ln 2 nats"),
        "multiplies by ln 2": (lambda loss, n, text: loss * n / len(text.encode()) * math.log(2), "ln 2 nats"),
        "per token": (lambda loss, n, text: loss / math.log(2), "total loss"),
        "per character": (lambda loss, n, text: loss * n / len(text) / math.log(2), "bytes, not characters"),
    },
)
def test_bits_per_byte(candidate):
    one = float(candidate(math.log(2), 4, "abcd"))
    assert one == pytest.approx(1), "a bit has ln 2 nats: ln 2 nats for each of 4 tokens of a byte is 1 bit per byte"
    two = float(candidate(math.log(2), 2, "abcd"))
    assert two == pytest.approx(0.5), "the total loss, loss · n_targets, is divided by the length of the text"
    assert float(candidate(1.0, 3, TEXT)) == pytest.approx(right_bits(1.0, 3, TEXT)), "count bytes, not characters"


def right_floor(records, encode):
    return -sum(record["log_prob"] for record in records) / sum(len(encode(r["text"])) + 1 for r in records)


RECORDS = [{"text": "ab", "log_prob": -6.0}, {"text": "abcdefghi", "log_prob": -2.0}]


@exercise(
    "ch01_floor",
    solution=right_floor,
    wrong={
        "sign": (lambda records, encode: -right_floor(records, encode), "never negative"),
        "without the end": (
            lambda records, encode: -sum(r["log_prob"] for r in records) / sum(len(encode(r["text"])) for r in records),
            "the end of a text",
        ),
        "per text": (lambda records, encode: -sum(r["log_prob"] for r in records) / len(records), "per token"),
        "mean of the texts' means": (
            lambda records, encode: sum(-r["log_prob"] / (len(encode(r["text"])) + 1) for r in records) / len(records),
            "long text",
        ),
    },
)
def test_floor(candidate):
    one = float(candidate(RECORDS[:1], list))
    assert one >= 0, "a loss is never negative: it is minus the logarithm of a probability"
    assert one != pytest.approx(3.0), "2 tokens and the end of a text make 3 predictions"
    assert one == pytest.approx(2.0), "6 nats over 3 predictions: the floor is per token, not per text"
    both = float(candidate(RECORDS, list))
    assert both == pytest.approx(8 / 13), "divide all nats by all tokens: a long text has more of them than a short one"


def right_speed(steps):
    return sum(n_tokens for n_tokens, _ in steps) / sum(seconds for _, seconds in steps)


def finder(speed):
    assert speed([(100, 1.0), (100, 9.0)]) == pytest.approx(20)


def equal_times(speed):
    assert speed([(100, 2.0), (300, 2.0)]) == pytest.approx(100)


def one_step(speed):
    assert speed([(100, 4.0)]) == pytest.approx(25)


def expects_the_fault(speed):
    assert speed([(100, 1.0), (100, 9.0)]) == pytest.approx((100 + 100 / 9) / 2)


test_find_the_bug = find_the_bug(
    "ch01_bug",
    right=right_speed,
    finder=finder,
    wrong={"equal times": equal_times, "one step": one_step, "expects the fault": expects_the_fault},
    hint="it hides in a run whose steps all take the same time",
)
