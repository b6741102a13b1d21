"""Gradients are averaged once per step, in its last backward pass, and not after every micro-batch."""

import json

import pytest


@pytest.fixture(scope="module")
def counts(once, torchrun) -> dict[str, list[int]]:
    """The reductions in each of the three backward passes of two steps, by engine."""
    out = once("collectives", lambda out: torchrun(2, "-m", "tests.contracts.collectives", str(out), "ddp", "fsdp"))
    return json.loads((out / "counts.json").read_text())


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_nothing_is_reduced_before_the_last_micro_batch(counts, engine):
    assert [n > 0 for n in counts[engine]] == 2 * [False, False, True]
