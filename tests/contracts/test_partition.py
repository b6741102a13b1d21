"""However a step is cut into micro-batches and dealt to ranks, its gradients are the same, in every stage."""

from pathlib import Path

import pytest
import torch

from tests.contracts import checks
from tests.contracts.distill_runs import make_teacher, make_tokenizer
from tests.contracts.harness import CONFIG, MOE_CONFIG, largest_difference
from tests.contracts.partitions import BATCH_SIZES, CASES, ROWS, gradients

N_RANKS = (1, 2, 4)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("double, bound", [(False, 1e-6), (True, 1e-12)], ids=["fp32", "fp64"])
def test_partition_invariance(tmp_path, double, bound, config, weighted):
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
    """The gradients by number of ranks and (case, micro-batch size)."""
    return {n_ranks: torch.load(out / f"ranks{n_ranks}.pt") for n_ranks in N_RANKS[1:]}


@pytest.mark.parametrize(
    "kind, double", CASES, ids=[f"{kind}-{'fp64' if double else 'fp32'}" for kind, double in CASES]
)
def test_every_factorisation_of_a_step(tmp_path, out, of_many_ranks, kind, double):
    """16 rows as micro-batch × accumulation × ranks in six ways; the third step has a single row."""
    whole = gradients(kind, double, tmp_path, teacher=out / "teacher", batch_size=ROWS)
    assert len(whole) == 3
    assert any(gradient.norm() > 0 for gradient in whole[0].values())  # that of an adapter's A begins at zero
    for n_ranks in N_RANKS:
        for batch_size in BATCH_SIZES[n_ranks]:
            if n_ranks == 1:
                cut = gradients(kind, double, tmp_path, teacher=out / "teacher", batch_size=batch_size)
            else:
                cut = of_many_ranks[n_ranks][kind, double, batch_size]
            for step, (ours, wanted) in enumerate(zip(cut, whole, strict=True)):
                difference = largest_difference(ours, wanted)
                where = f"step {step}: {n_ranks} ranks, micro-batches of {batch_size}: {difference:.1e}"
                assert difference <= (1e-12 if double else 1e-6), where
