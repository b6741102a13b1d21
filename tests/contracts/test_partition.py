"""However a step is cut into micro-batches and dealt to ranks, its gradients are the same, in every stage."""

from pathlib import Path

import pytest
import torch

from tests.contracts import checks
from tests.contracts.distill_runs import make_teacher, make_tokenizer
from tests.contracts.harness import CONFIG, MOE_CONFIG, largest_difference
from tests.contracts.partitions import BATCH_SIZES, CASES, ROWS, cases, gradients

N_RANKS = (1, 2, 4)


@pytest.mark.parametrize(
    "config, weighted, double, bound",
    [(CONFIG, False, False, 1e-6), (MOE_CONFIG, True, True, 1e-12)],
    ids=["dense, fp32", "experts and weights, fp64"],
)
def test_partition_invariance(tmp_path, config, weighted, double, bound):
    """With experts the balance and z-losses are part of the gradients, and the bias moves from step to step."""
    checks.partition_invariance(tmp_path, double=double, bound=bound, config=config, weighted=weighted)


@pytest.fixture(scope="module")
def out(once, torchrun):
    """A directory with a teacher in it, for the stages that need one, and the gradients of two and of four ranks."""

    def build(directory: Path) -> None:
        make_teacher(directory / "teacher", make_tokenizer())
        for n_ranks in N_RANKS[1:]:
            torchrun(n_ranks, "-m", "tests.contracts.partitions", str(directory))

    return once("partitions", build)


@pytest.fixture(scope="module")
def of_many_ranks(out) -> dict:
    """The gradients by number of ranks and case."""
    return {n_ranks: torch.load(out / f"ranks{n_ranks}.pt") for n_ranks in N_RANKS[1:]}


@pytest.mark.parametrize(
    "kind, double", CASES, ids=[f"{kind}-{'fp64' if double else 'fp32'}" for kind, double in CASES]
)
def test_every_factorisation_of_a_step(tmp_path, out, of_many_ranks, kind, double):
    """16 rows as micro-batch × accumulation × ranks: 16 × 1 × 1, 1 × 16 × 1, 2 × 4 × 2, and every way to count also as
    2 × 2 × 4; the third step has a single row."""
    whole = gradients(kind, double, tmp_path, teacher=out / "teacher", batch_size=ROWS)
    assert len(whole) == 3
    assert any(gradient.norm() > 0 for gradient in whole[0].values())  # that of an adapter's A begins at zero
    cuts = {n_ranks: found[kind, double] for n_ranks, found in of_many_ranks.items() if (kind, double) in found}
    cuts[1] = gradients(kind, double, tmp_path, teacher=out / "teacher", batch_size=BATCH_SIZES[1])
    assert len(cuts) == (3 if (kind, double) in cases(4) else 2)
    for n_ranks, cut in cuts.items():
        for step, (ours, wanted) in enumerate(zip(cut, whole, strict=True)):
            difference = largest_difference(ours, wanted)
            where = f"step {step}: {n_ranks} ranks, micro-batches of {BATCH_SIZES[n_ranks]}: {difference:.1e}"
            assert difference <= (1e-12 if double else 1e-6), where
