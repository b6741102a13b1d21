"""The monitor where no rank has the gradients whole: two ranks of every engine see the figures of one process."""

from pathlib import Path

import pytest
import torch

from tests.contracts.harness import largest_difference
from tests.contracts.monitors import CLIP, INTERVAL, N_STEPS, run_one
from tests.contracts.test_engines import known, needs

pytestmark = pytest.mark.timeout(600)

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero2off", "zero3"]
DORA = [f"{engine}-dora" for engine in ("fsdp", "zero3")]  # whose weights are in parts
BALANCED = [f"{engine}-balanced" for engine in ("fsdp", "zero2", "zero3")]
UNSEEN = [f"{engine}-unseen" for engine in ("fsdp", "zero3")]
RESUMED = ["fsdp-resumed"]
LOCAL = ["zero2-local"]


@pytest.fixture(scope="module")
def two_ranks(torchrun, once) -> Path:
    """All runs of two ranks, one launch: a file each."""
    words = known([*ENGINES, *DORA, *BALANCED, *RESUMED, *UNSEEN, *LOCAL])
    return once("monitors", lambda out: torchrun(2, "-m", "tests.contracts.monitors", str(out), *words))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    """The same of one process, by kind."""
    return {kind: run_one(f"ddp-{kind}", tmp_path_factory.mktemp("one")) for kind in ("", "dora", "balanced", "unseen")}


def assert_equal_looks(ours: list[dict], reference: list[dict]) -> None:
    """Compare all figures of all looks."""
    assert [row["step"] for row in ours] == [1, *range(INTERVAL, N_STEPS + 1, INTERVAL)]
    for row, wanted in zip(ours, reference, strict=True):
        assert row["warnings"] == wanted["warnings"]
        assert row["layers"].keys() == wanted["layers"].keys()
        for layer, figures in wanted["layers"].items():
            for name, value in figures.items():
                if value is None:
                    assert row["layers"][layer][name] is None, (row["step"], layer, name)
                    continue
                close = pytest.approx(value, rel=1e-5, abs=1e-12)
                assert row["layers"][layer][name] == close, (row["step"], layer, name)


@pytest.mark.parametrize("name", [*ENGINES, *DORA, *BALANCED])
def test_two_ranks_see_what_one_process_sees(two_ranks, one_process, name):
    needs(name)
    ours, reference = torch.load(two_ranks / f"{name}.pt"), one_process[name.partition("-")[2]]
    assert_equal_looks(ours["rows"], reference["rows"])
    assert largest_difference(ours["weights"], reference["weights"]) <= 3e-5


@pytest.mark.parametrize("name", UNSEEN)
def test_a_monitor_changes_no_bit(two_ranks, name):
    needs(name)
    engine = name.partition("-")[0]
    seen, unseen = (torch.load(two_ranks / f"{each}.pt") for each in (engine, name))
    assert seen["metrics"] == unseen["metrics"]
    assert all(torch.equal(seen["weights"][key], weight) for key, weight in unseen["weights"].items())


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_sees_the_same(two_ranks, name):
    needs(name)
    resumed, whole = (torch.load(two_ranks / f"{each}.pt") for each in (name, name.partition("-")[0]))
    assert resumed["rows"] == whole["rows"]
    assert set(resumed["gathers"]) == {0, 1, 3}  # the looks after updates 1 and 2, and after the resume


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_gradients_are_gathered_only_for_a_look(two_ranks, engine):
    needs(engine)
    ours = torch.load(two_ranks / f"{engine}.pt")
    n_matrices = 2 * len(ours["rows"][0]["layers"])
    looks = [row["step"] - 1 for row in ours["rows"]]  # updates made before
    assert ours["gathers"] == [step for step in looks for _ in range(n_matrices)]


@pytest.mark.parametrize("name", LOCAL)
def test_a_part_of_the_gradient_is_caught(two_ranks, one_process, name):
    needs(name)
    with pytest.raises(AssertionError, match="grad_norm_B"):
        assert_equal_looks(torch.load(two_ranks / f"{name}.pt")["rows"], one_process[""]["rows"])


def test_gradients_are_clipped_and_balanced(one_process):
    """Otherwise nothing of either would be seen above."""
    assert all(row["grad_norm"] > CLIP for row in one_process[""]["metrics"])
    for plain, balanced in zip(*(one_process[kind]["rows"][1:] for kind in ("", "balanced")), strict=True):
        assert all(layer["grad_ratio"] > 10 for layer in plain["layers"].values())
        assert all(layer["grad_ratio"] == pytest.approx(2) for layer in balanced["layers"].values())
