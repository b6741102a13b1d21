"""Two processes, uneven targets, the last step partial: every engine equals one process, and reads all checkpoints."""

from pathlib import Path

import pytest
import torch

from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, largest_difference, tiny_model, train

# The first test of each kind waits for all runs of its kind, with DeepSpeed building its extensions once.
pytestmark = pytest.mark.timeout(900)

ENGINES = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero2off", "zero3off"]
WITH_EXPERTS = ["ddp", "fsdp", "zero1", "zero3"]
WITH_ADAPTER = ["ddp", "fsdp", "zero2", "zero3"]
SHORT = ["fsdp_bf16", "zero2_bf16", "zero3_bf16"]  # weights that the forward pass sees in bfloat16
SAVED = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3off", "fsdp_moe", *SHORT]
RESUMED = {  # number of ranks: who goes on from whose checkpoint, which two ranks have written
    1: ["fsdp:fsdp", "ddp:zero3", "zero3:zero3off", "ddp_moe:fsdp_moe"],
    2: ["ddp:ddp", "fsdp:fsdp", "zero1:zero1", "zero2:zero2", "zero3:zero3"],
    4: ["ddp:ddp", "zero3:zero3", "zero2:fsdp", "fsdp:zero1", "fsdp_moe:fsdp_moe"],
}


def needs(name: str):
    """Skip where DeepSpeed is not installed and the engine is DeepSpeed's."""
    if "zero" in name:
        pytest.importorskip("deepspeed")


def known(names: list[str]) -> list[str]:
    """Return the engines that can run here."""
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return [name for name in names if "zero" not in name]
    return names


@pytest.fixture(scope="module")
def launch(torchrun, once):
    """Call it with a number of ranks, a name and the engines to try: one file per engine is in the directory."""

    def launch(n_ranks: int, name: str, *words: str) -> Path:
        return once(name, lambda out: torchrun(n_ranks, "-m", "tests.contracts.engines", str(out), *words))

    return launch


@pytest.fixture(scope="module")
def two_processes(launch) -> Path:
    names = [*ENGINES, *(f"{name}_moe" for name in WITH_EXPERTS), *(f"{name}_lora" for name in WITH_ADAPTER)]
    return launch(2, "engines", *known(names), "bypassed")


@pytest.fixture(scope="module")
def saved(launch) -> Path:
    """Runs of six steps that a signal has ended after three."""
    out = launch(2, "engines_saved", "--stop", "3", *known(SAVED))
    assert not list(out.glob("*.pt"))  # none has come to its end
    assert len(list(out.rglob("checkpoints/step-00000003"))) == len(known(SAVED))
    return out


@pytest.fixture(scope="module")
def resumed(launch, saved) -> dict[int, Path]:
    return {
        n_ranks: launch(n_ranks, f"engines_resumed_on_{n_ranks}", "--from", str(saved), *known(names))
        for n_ranks, names in (RESUMED | {2: [*RESUMED[2], *SHORT, *(f"{name}:{name}" for name in SHORT)]}).items()
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict:
    """What one process does, by kind of model and number of steps."""
    kinds = {"": {}, "moe": {"config": MOE_CONFIG}, "lora": {"lora": True}}
    return {
        (kind, n_steps): train(
            arguments(
                tmp_path_factory.mktemp("one"), batch_size=4, global_batch_size=12, max_steps=n_steps, eval_interval=2
            ),
            validate=True,
            **options,
        )
        for kind, options in kinds.items()
        for n_steps in (3, 6)
    }


def assert_equal_runs(path: Path, reference: dict) -> dict:
    ours = torch.load(path)
    assert [row["step"] for row in ours["metrics"]] == [row["step"] for row in reference["metrics"]]
    for row, wanted in zip(ours["metrics"], reference["metrics"], strict=True):
        assert row["tokens"] == wanted["tokens"]
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-6)
    assert ours["validations"] == pytest.approx(reference["validations"], rel=1e-6)
    # Updates of AdamW: an element whose gradient is nearly nothing moves by lr × g / |g|, so the last digit of its
    # gradient, which depends on the order of summation, shows in its weight and, after that, in its moments.
    assert largest_difference(ours["weights"], reference["weights"]) <= 1e-5
    for index, state in reference["optimizer"]["state"].items():
        assert float(ours["optimizer"]["state"][index]["step"]) == float(state["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            difference = ours["optimizer"]["state"][index][name] - state[name]
            assert difference.norm() <= 1e-4 * state[name].norm(), (index, name)
    return ours


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(two_processes, one_process, engine):
    needs(engine)
    assert_equal_runs(two_processes / f"{engine}.pt", one_process["", 3])


@pytest.mark.parametrize("engine", WITH_EXPERTS)
def test_two_processes_equal_one_with_experts(two_processes, one_process, engine):
    """In the last step one rank's last micro-batch is padding alone: none of its experts gets a token."""
    needs(engine)
    reference = one_process["moe", 3]
    ours = assert_equal_runs(two_processes / f"{engine}_moe.pt", reference)
    biases = {name: bias for name, bias in reference["weights"].items() if name.endswith("correction_bias")}
    assert len(biases) == 2
    for name, bias in biases.items():
        assert bias.any()
        assert torch.equal(ours["weights"][name], bias)  # counts are whole numbers: no rounding
    for row, wanted in zip(ours["metrics"], reference["metrics"], strict=True):
        for name in ("balance_loss", "z_loss", "expert_load_max", "expert_entropy"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-6)
        assert row["expert_share"] == wanted["expert_share"]


@pytest.mark.parametrize("engine", WITH_ADAPTER)
def test_two_processes_equal_one_with_an_adapter(two_processes, one_process, engine):
    """What is frozen takes no part in the reduction, and there is no search for unused parameters."""
    needs(engine)
    ours = assert_equal_runs(two_processes / f"{engine}_lora.pt", one_process["lora", 3])["weights"]
    base = tiny_model().state_dict()
    assert all(torch.equal(ours[name], base[name]) for name in base)
    assert all(ours[name].any() for name in ours.keys() - base.keys())


def test_a_bypassed_ddp_is_caught(two_processes, one_process):
    """The tenth seeded bug."""
    with pytest.raises(AssertionError):
        assert_equal_runs(two_processes / "bypassed.pt", one_process["", 3])


@pytest.mark.parametrize("n_ranks, name", [(n, name) for n, names in RESUMED.items() for name in names])
def test_a_run_of_two_ranks_goes_on(resumed, one_process, n_ranks, name):
    """On as many ranks, on one and on four, on the same engine and on others; rows and optimizer state are the same."""
    needs(name)
    kind = name.partition(":")[0].partition("_")[2]
    assert_equal_runs(resumed[n_ranks] / f"{name.replace(':', '-after-')}.pt", one_process[kind, 6])


@pytest.mark.parametrize("name", SHORT)
def test_master_weights_are_kept_whole(resumed, name):
    """In bfloat16 too a run of two ranks goes on bit by bit, and what it gives in the end is not rounded."""
    needs(name)
    ours = torch.load(resumed[2] / f"{name}-after-{name}.pt")
    whole = torch.load(resumed[2] / f"{name}.pt")
    assert ours["metrics"] == whole["metrics"]
    for key, weight in whole["weights"].items():
        assert torch.equal(ours["weights"][key], weight), key
        assert not torch.equal(weight, weight.bfloat16().float()) or weight.ndim == 1, key


def test_shards_are_whose_they_are(saved):
    """FSDP2's ranks write a file each, neither of which holds the whole; the other engines' checkpoints are plain."""
    shards = list((saved / "fsdp").rglob("*.distcp"))
    assert len(shards) == 2
    sizes = [path.stat().st_size for path in shards]
    assert sum(sizes) > 3 * 4 * CONFIG.num_parameters()  # weights and two moments
    assert all(0.3 * sum(sizes) < size < 0.7 * sum(sizes) for size in sizes)
    assert not list((saved / "fsdp").rglob("checkpoints/*/model.safetensors"))
    assert list((saved / "ddp").rglob("checkpoints/*/model.safetensors"))
