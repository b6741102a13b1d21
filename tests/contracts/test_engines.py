"""Two processes, uneven targets, three steps of the real loop, the last one partial: equal to one process."""

from pathlib import Path

import pytest
import torch

from tests.contracts.harness import MOE_CONFIG, arguments, largest_difference, tiny_model, train

NAMES = ("ddp", "bypassed", "fsdp", "ddp_moe", "fsdp_moe", "ddp_lora", "fsdp_lora")


@pytest.fixture(scope="module")
def launch(torchrun):
    """Call it with a directory and the engines to try: two processes leave one file per engine there."""

    def launch(out: Path, *names: str) -> Path:
        torchrun(2, "-m", "tests.contracts.engines", str(out), *names)
        return out

    return launch


@pytest.fixture(scope="module")
def two_processes(launch, tmp_path_factory) -> Path:
    return launch(tmp_path_factory.mktemp("two"), *NAMES)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    return train(arguments(tmp_path_factory.mktemp("one"), batch_size=4, global_batch_size=12))


def assert_equal_runs(path: Path, reference: dict) -> None:
    ours = torch.load(path)
    assert [row["step"] for row in ours["metrics"]] == [1, 2, 3]
    for row, wanted in zip(ours["metrics"], reference["metrics"], strict=True):
        assert row["tokens"] == wanted["tokens"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
    # Three updates of AdamW: an element whose gradient is nearly nothing moves by lr × g / |g|, so the last digit of
    # its gradient, which depends on the order of summation, shows in its weight.
    assert largest_difference(ours["weights"], reference["weights"]) <= 1e-5


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_equal_one(two_processes, one_process, engine):
    assert_equal_runs(two_processes / f"{engine}.pt", one_process)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_experts(two_processes, tmp_path, engine):
    """In the last step one rank's last micro-batch is padding alone: none of its experts gets a token."""
    one_process = train(arguments(tmp_path, batch_size=4, global_batch_size=12), config=MOE_CONFIG)
    path = two_processes / f"{engine}_moe.pt"
    assert_equal_runs(path, one_process)
    ours = torch.load(path)
    biases = {name: bias for name, bias in one_process["weights"].items() if name.endswith("correction_bias")}
    assert len(biases) == 2
    for name, bias in biases.items():
        assert bias.any()
        assert torch.equal(ours["weights"][name], bias)  # counts are whole numbers: no rounding
    for row, wanted in zip(ours["metrics"], one_process["metrics"], strict=True):
        for name in ("balance_loss", "z_loss", "expert_load_max", "expert_entropy"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-6)
        assert row["expert_share"] == wanted["expert_share"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_an_adapter(two_processes, tmp_path, engine):
    """What is frozen takes no part in the reduction, and there is no search for unused parameters."""
    one_process = train(arguments(tmp_path, batch_size=4, global_batch_size=12), lora=True)
    assert_equal_runs(two_processes / f"{engine}_lora.pt", one_process)
    ours = torch.load(two_processes / f"{engine}_lora.pt")["weights"]
    base = tiny_model().state_dict()
    assert all(torch.equal(ours[name], base[name]) for name in base)
    assert all(ours[name].any() for name in ours.keys() - base.keys())


def test_a_bypassed_ddp_is_caught(two_processes, one_process):
    """The tenth seeded bug."""
    with pytest.raises(AssertionError):
        assert_equal_runs(two_processes / "bypassed.pt", one_process)


def test_deepspeed_equals_one(launch, tmp_path, one_process):
    pytest.importorskip("deepspeed")
    assert_equal_runs(launch(tmp_path, "zero2") / "zero2.pt", one_process)
