"""Exercises of chapter 25: the S-curve, a mixture, and a split that moves."""

import json
import tempfile
from pathlib import Path

import pytest

from minillm.data.prepare.near import candidate_probability as library_probability
from minillm.data.prepare.run import prepare
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.schema import parse_record
from minillm.data.sources.split import DataFiles
from tests.exercises.kit import exercise, find_the_bug


@exercise(
    "ch25_bands",
    solution=library_probability,
    wrong={
        "bands and rows swapped": (lambda s, b, r: 1 - (1 - s**b) ** r, "all its numbers"),
        "all bands must be equal": (lambda s, b, r: s ** (b * r), "one equal band is enough"),
        "bands added up": (lambda s, b, r: b * s**r, "at most 1"),
        "a number is enough": (lambda s, b, r: 1 - (1 - s) ** (b * r), "all its numbers"),
        "none is equal": (lambda s, b, r: (1 - s**r) ** b, "identical"),
    },
)
def test_candidate_probability(candidate):
    assert float(candidate(1.0, 18, 7)) <= 1, "a probability is at most 1: bands may be equal at the same time"
    assert float(candidate(1.0, 18, 7)) == pytest.approx(1), "identical records have every band equal"
    assert float(candidate(0.5, 1, 3)) == pytest.approx(0.125), "a band is equal if all its numbers are: 0.5 to the 3rd"
    assert float(candidate(0.5, 2, 1)) == pytest.approx(0.75), "one equal band is enough: 1 minus 'no band is equal'"
    for s in (0.0, 0.3, 0.8):
        assert float(candidate(s, 18, 7)) == pytest.approx(library_probability(s, 18, 7)), (
            f"18 bands of 7 numbers, similarity {s}"
        )


def library_mixture(available, shares, size):
    """Write files with so many records and mix them."""
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for source, (n_records, share) in enumerate(zip(available, shares, strict=True)):
            path = Path(folder) / f"{source}.jsonl"
            path.write_text("".join(json.dumps({"text": f"{source} {n}"}) + "\n" for n in range(n_records)))
            parts.append(f"{path}:{share}")
        settings = PrepareSettings(
            data_path=",".join(parts), output=f"{folder}/mixed.jsonl", mix_size=size, weight_unit="records"
        )
        return [source["written"] for source in prepare(settings)["mixture"]]


def by_formula(available, shares, size, *, choose=None):
    parts = [share / sum(shares) for share in shares]
    choose = choose or {"smallest": min, "largest": max}[size]
    total = choose(n / part for n, part in zip(available, parts, strict=True))
    return [round(total * part) for part in parts]


def of_the_sum(available, shares, size):
    return [round(sum(available) * share / sum(shares)) for share in shares]


def not_normalised(available, shares, size):
    total = {"smallest": min, "largest": max}[size](n / share for n, share in zip(available, shares, strict=True))
    return [round(total * share / sum(shares)) for share in shares]


def of_the_smallest_source(available, shares, size):
    total = {"smallest": min, "largest": max}[size](available)
    return [round(total * share / sum(shares)) for share in shares]


@exercise(
    "ch25_shares",
    solution=library_mixture,
    wrong={
        "shares of everything": (of_the_sum, "twice"),
        "shares that add up to 10": (not_normalised, "add up to 1"),
        "the smallest source is the whole": (of_the_smallest_source, "as many as possible"),
        "always the smallest": (lambda n, shares, size: by_formula(n, shares, size, choose=min), "every record"),
        "a share of each source": (
            lambda n, shares, size: [round(a * s / sum(shares)) for a, s in zip(n, shares, strict=True)],
            "70 %",
        ),
    },
)
def test_mixture(candidate):
    smallest = list(candidate([300, 100], [0.7, 0.3], "smallest"))
    assert smallest[0] / sum(smallest) == pytest.approx(0.7, abs=0.01), (
        "the first source must be 70 % of all that is written"
    )
    assert smallest[1] <= 100, "no record may be written twice: the source that is scarcest for its share decides"
    assert smallest == [233, 100], "as many as possible: the 100 records of the second source are 30 % of 333"
    assert list(candidate([300, 100], [7, 3], "smallest")) == [233, 100], (
        "7 and 3 are shares of 0.7 and 0.3: divide them by their sum, so that they add up to 1"
    )
    largest = list(candidate([300, 100], [0.7, 0.3], "largest"))
    assert largest == [300, 129], (
        "largest: every record is written, the second source is repeated to keep its share; 128.57 are rounded to 129"
    )


def right_split(texts, ratio):
    files = DataFiles("", valid_ratio=ratio, side="valid")
    return [files.takes(parse_record({"text": text}, 1)) for text in texts]


TEXTS = [f"text {n}" for n in range(200)]


def finder(held_out):
    before = dict(zip(TEXTS, held_out(TEXTS, 0.2), strict=True))
    after = dict(zip(["new", *TEXTS], held_out(["new", *TEXTS], 0.2), strict=True))
    moved = [text for text in TEXTS if before[text] != after[text]]
    assert not moved, "a new record at the front must not move another one from one side to the other"


def twice_the_same(held_out):
    assert held_out(TEXTS, 0.2) == held_out(TEXTS, 0.2)


def about_the_ratio(held_out):
    assert 20 <= sum(held_out(TEXTS, 0.2)) <= 60


def new_at_the_end(held_out):
    assert held_out([*TEXTS, "new"], 0.2)[:200] == held_out(TEXTS, 0.2)


def exactly_the_ratio(held_out):
    assert sum(held_out(TEXTS, 0.2)) == 40


test_find_the_bug = find_the_bug(
    "ch25_bug",
    right=right_split,
    finder=finder,
    wrong={
        "twice the same": twice_the_same,
        "about the ratio": about_the_ratio,
        "a new record at the end": new_at_the_end,
        "exactly the ratio": exactly_the_ratio,
    },
    hint="it hides while every text stays at its place in the list",
)
