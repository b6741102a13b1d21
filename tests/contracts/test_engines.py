"""Two processes, uneven targets, the last step partial: every engine equals one process, and reads all checkpoints."""

from pathlib import Path

import pytest
import torch

from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, largest_difference, tiny_model, train

# The first test of each kind waits for all runs of its kind, with DeepSpeed building its extensions once.
pytestmark = pytest.mark.timeout(900)

# Two ranks, one launch. Every engine trains a whole model, an adapter or experts; the usual ones all three. The first
# steps of a whole model are seen in the runs that resume, too: they are compared from their first step.
THREE_STEPS = ["zero2off", "zero3off"]
WITH_EXPERTS = ["ddp", "zero1", "zero3"]  # and fsdp goes on
WITH_ADAPTER = ["ddp", "fsdp", "zero2", "zero3"]
SHORT = ["fsdp_bf16", "zero2_bf16", "zero3_bf16"]  # weights that the forward pass sees in bfloat16
SAVED = ["ddp", "fsdp", "zero1", "zero2", "zero3", "zero3off", "fsdp_moe", *SHORT]
RESUMED = {  # number of ranks: who goes on from whose checkpoint, which two ranks have written
    1: ["fsdp:zero1", "ddp:zero3", "zero3:zero3off", "ddp_moe:fsdp_moe"],
    2: ["ddp:ddp", "fsdp:fsdp", "zero1:zero1", "zero2:zero2", "zero3:zero3"],
    4: ["zero3:zero3", "zero2:fsdp", "fsdp_moe:fsdp_moe"],
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
    """All runs of two ranks: of three steps, of six, ended by a signal after three, and gone on with."""
    experts, adapters = ([f"{name}_{kind}" for name in names]
                         for kind, names in (("moe", WITH_EXPERTS), ("lora", WITH_ADAPTER)))  # fmt: skip
    stopped = [f"{name}@3" for name in known(SAVED)]
    whole = [f"{name}@6" for name in SHORT]
    resumed = [*RESUMED[2], *(f"{name}:{name}" for name in SHORT)]
    words = known([*THREE_STEPS, *experts, *adapters, *whole, *resumed])
    out = launch(2, "engines", "bypassed", *stopped, *words)
    assert all(list((out / name).rglob("checkpoints/step-00000003")) for name in stopped)
    assert not list(out.glob("*@3.pt"))  # none has come to its end
    return out


@pytest.fixture(scope="module")
def resumed(launch, two_processes) -> dict[int, Path]:
    """Where the runs are that go on, by number of ranks."""
    others = {
        n_ranks: launch(n_ranks, f"engines_{n_ranks}", "--from", str(two_processes), *known(RESUMED[n_ranks]))
        for n_ranks in (1, 4)
    }
    return others | {2: two_processes}


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
        for n_steps in ((3,) if kind == "lora" else (3, 6))
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
    assert largest_difference(ours["weights"], reference["weights"]) <= 3e-5
    for index, state in reference["optimizer"]["state"].items():
        assert float(ours["optimizer"]["state"][index]["step"]) == float(state["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            difference = ours["optimizer"]["state"][index][name] - state[name]
            assert difference.norm() <= 1e-4 * state[name].norm(), (index, name)
    return ours


def assert_equal_experts(path: Path, reference: dict) -> None:
    """The routers' biases and what is said of the experts, besides."""
    ours = assert_equal_runs(path, reference)
    biases = {name: bias for name, bias in reference["weights"].items() if name.endswith("correction_bias")}
    assert len(biases) == 2
    for name, bias in biases.items():
        assert bias.any()
        assert torch.equal(ours["weights"][name], bias)  # counts are whole numbers: no rounding
    for row, wanted in zip(ours["metrics"], reference["metrics"], strict=True):
        for name in ("balance_loss", "z_loss", "expert_load_max", "expert_entropy"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-6)
        assert row["expert_share"] == wanted["expert_share"]


@pytest.mark.parametrize("engine", THREE_STEPS)
def test_two_processes_equal_one(two_processes, one_process, engine):
    needs(engine)
    assert_equal_runs(two_processes / f"{engine}.pt", one_process["", 3])


@pytest.mark.parametrize("engine", WITH_EXPERTS)
def test_two_processes_equal_one_with_experts(two_processes, one_process, engine):
    """In the last step one rank's last micro-batch is padding alone: none of its experts gets a token."""
    needs(engine)
    assert_equal_experts(two_processes / f"{engine}_moe.pt", one_process["moe", 3])


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
    path = resumed[n_ranks] / f"{name.replace(':', '-after-')}.pt"
    (assert_equal_experts if kind == "moe" else assert_equal_runs)(path, one_process[kind, 6])


@pytest.mark.parametrize("name", SHORT)
def test_master_weights_are_kept_whole(resumed, name):
    """In bfloat16 too a run of two ranks goes on bit by bit, and what it gives in the end is not rounded."""
    needs(name)
    ours = torch.load(resumed[2] / f"{name}-after-{name}.pt")
    whole = torch.load(resumed[2] / f"{name}@6.pt")
    assert ours["metrics"] == whole["metrics"]
    for key, weight in whole["weights"].items():
        assert torch.equal(ours["weights"][key], weight), key
        assert not torch.equal(weight, weight.bfloat16().float()) or weight.ndim == 1, key


def test_shards_are_whose_they_are(two_processes):
    """FSDP2's ranks write a file each, neither of which holds the whole; the other engines' checkpoints are plain."""
    shards = list((two_processes / "fsdp@3").rglob("*.distcp"))
    assert len(shards) == 2
    sizes = [path.stat().st_size for path in shards]
    assert sum(sizes) > 3 * 4 * CONFIG.num_parameters()  # weights and two moments
    assert all(0.3 * sum(sizes) < size < 0.7 * sum(sizes) for size in sizes)
    assert not list((two_processes / "fsdp@3").rglob("checkpoints/*/model.safetensors"))
    assert list((two_processes / "ddp@3").rglob("checkpoints/*/model.safetensors"))
