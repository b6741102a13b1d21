"""A stage under torchrun: two processes give one process's run, and leave one run directory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.reports.tracking import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launch(torchrun, world, flags):
    """Call it with the number of processes and the rows of each: five updates of 8 rows leave a run directory."""

    def launch(n_processes: int, *, batch_size: int) -> Path:
        out = world.folder / f"out{n_processes}"
        output = torchrun(
            n_processes, str(ROOT / "train_pretrain.py"), *flags(world), "--save_dir", str(out),
            "--tokenizer_path", str(world.out / "tokenizer"), "--data_path", str(world.text),
            "--valid_path", str(world.text_valid), "--max_seq_len", "48", "--batch_size", str(batch_size),
            "--global_batch_size", "8", "--max_steps", "5", "--save_interval", "2", "--log_interval", "1",
        )  # fmt: skip
        assert output.count("saved ") == 1  # the main rank alone speaks
        return out / "pretrain_32"

    return launch


def test_two_processes_equal_one(launch):
    two, one = launch(2, batch_size=2), launch(1, batch_size=4)
    rows = [
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (two, one)
    ]
    assert [(row["step"], row["split"], row["tokens"]) for row in rows[0]] == [
        (row["step"], row["split"], row["tokens"]) for row in rows[1]
    ]
    for ours, wanted in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    ours, wanted = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name, weight in wanted.items():
        # Five AdamW updates: where a gradient is nearly nothing its last digit decides the update's sign.
        assert ((ours[name] - weight).norm() / weight.norm()).item() < 1e-4, name
    state = torch.load(two / "checkpoints" / "step-00000005" / "training_state.pt", weights_only=True)
    assert len(state["rng"]) == 2  # of every rank


@pytest.fixture
def launch_lora(torchrun, world, flags):
    """The same for train_lora.py, on one base, with dropout off: processes draw masks of their own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Transformer(ModelConfig(vocab_size=world.tokenizer.vocab_size, **shape))
    save_model(model, world.folder / "base", tokenizer=world.tokenizer)

    def launch(n_processes: int, *more: str, batch_size: int) -> Path:
        out = world.folder / f"out{n_processes}"
        output = torchrun(
            n_processes, str(ROOT / "train_lora.py"), *flags(world), "--save_dir", str(out),
            "--from_weight", str(world.folder / "base"), "--data_path", str(world.chat), "--replay_path",
            str(world.chat_valid), "--max_seq_len", "300", "--batch_size", str(batch_size), "--global_batch_size", "4",
            "--max_steps", "5", "--save_interval", "2", "--log_interval", "1", "--learning_rate", "1e-2",
            "--lora_init", "gaussian", "--use_dora", "--monitor_interval", "2", "--balance_gradients", *more,
        )  # fmt: skip
        assert output.count("saved ") == 1
        return out / "lora" / "lora_32"

    return launch


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_the_adapter_of_one(launch_lora, parallel):
    """DDP without a search for unused parameters: what is frozen takes no part, all the rest is used."""
    two, one = launch_lora(2, "--parallel", parallel, batch_size=1), launch_lora(1, batch_size=4)
    rows = [
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (two, one)
    ]
    for ours, wanted in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    ours, wanted = load_file(two / "adapter_model.safetensors"), load_file(one / "adapter_model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert ((ours[name] - weight).norm() / weight.norm()).item() < 1e-4, name
    assert any("magnitude" in name for name in wanted)
    looks = [read_metrics(directory / "monitor.jsonl") for directory in (two, one)]
    assert [row["step"] for row in looks[0]] == [1, 2, 4]
    for ours, wanted in zip(*looks, strict=True):
        for layer, figures in wanted["layers"].items():
            assert ours["layers"][layer]["grad_norm_B"] == pytest.approx(figures["grad_norm_B"], rel=1e-4), layer
    page = (two / "summary.html").read_text(encoding="utf-8")
    assert "Adapter at step 4" in page
    assert "most frequent targets" in page


@pytest.fixture
def launch_kto(torchrun, world, flags):
    """The same for train_dpo.py with KTO, whose baseline is a mean over all ranks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Transformer(ModelConfig(vocab_size=world.tokenizer.vocab_size, **shape))
    save_model(model, world.folder / "base", tokenizer=world.tokenizer)
    texts = [f"{'the little fox ' * (1 + n % 3)}saw {n}" for n in range(20)]
    records = [{"prompt": t, "chosen": f"{t} and an old dog", "rejected": "apples"} for t in texts]
    pairs = world.write(world.folder / "pairs.jsonl", records)

    def launch(n_processes: int, *, batch_size: int) -> Path:
        out = world.folder / f"out{n_processes}"
        output = torchrun(
            n_processes, str(ROOT / "train_dpo.py"), *flags(world), "--save_dir", str(out), "--loss_type", "kto",
            "--from_weight", str(world.folder / "base"), "--data_path", str(pairs), "--valid_path", str(pairs),
            "--max_seq_len", "90", "--batch_size", str(batch_size), "--global_batch_size", "4", "--max_steps", "5",
            "--save_interval", "2", "--log_interval", "2", "--learning_rate", "1e-3",
        )  # fmt: skip
        assert output.count("saved ") == 1
        return out / "rlhf_32"

    return launch


def test_two_processes_judge_as_one(launch_kto):
    two, one = launch_kto(2, batch_size=1), launch_kto(1, batch_size=4)
    rows = [
        [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        for directory in (two, one)
    ]
    assert rows[1][-1]["reward_good"] > rows[1][-1]["reward_bad"]
    for ours, wanted in zip(*rows, strict=True):
        for name in ("loss", "accuracy", "reward_good", "reward_bad", "baseline", "kl", "length"):
            assert ours[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), (ours["step"], name)
    ours, wanted = load_file(two / "model.safetensors"), load_file(one / "model.safetensors")
    for name, weight in wanted.items():
        assert ((ours[name] - weight).norm() / weight.norm()).item() < 1e-4, name
