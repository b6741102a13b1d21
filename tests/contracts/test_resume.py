"""A run that is killed, at any moment, and resumed equals one that was not, bit by bit."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.checkpoints.checkpoint import list_checkpoints
from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.reports.tracking import CLOCK, read_metrics
from minillm.tokenizer import train_bpe
from tests.contracts import checks
from tests.contracts.harness import MOE_CONFIG

ROOT = Path(__file__).parents[2]

# Runs a stage and kills its own process, without a chance to clean up, at the given call of a function.
DEADLY = """
import importlib, os, signal, sys
stage, module, owner, name, call, *argv = sys.argv[1:]
target = importlib.import_module(module)
target = getattr(target, owner) if owner else target
original, calls = getattr(target, name), 0
def deadly(*args, **options):
    global calls
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)
setattr(target, name, deadly)
importlib.import_module(stage).main(argv)
"""
MOMENTS = {
    "in the middle of accumulation": ("minillm.training.step", "Step", "backward", 12),
    "between two updates": ("minillm.training.run", "Run", "update", 6),
    "while the weights of a checkpoint are written": ("minillm.checkpoints.checkpoint", "", "sha256", 12),
    "before a checkpoint gets its name": ("os", "", "rename", 2),
    "after it got its name": ("shutil", "", "rmtree", 1),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ragged texts and chats, and a tokenizer."""
    directory = tmp_path_factory.mktemp("data")
    words = ["the", "old", "house", "老", "房子", "stands", "by", "河", "边"]
    texts = [" ".join(words[(n * k) % 9] for k in range(1, 3 + n % 11)) for n in range(90)]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " ".join(text.split()[: 1 + n % 4])}]
        for n, text in enumerate(texts)
    ]
    lines = {"text.jsonl": [{"text": t} for t in texts], "chat.jsonl": [{"conversations": c} for c in chats]}
    lines["pairs.jsonl"] = [
        {"prompt": chat[0]["content"], "chosen": chat[1]["content"], "rejected": f"{chat[1]['content']} 河"}
        for chat in chats
    ]
    lines["reason.jsonl"] = [
        {"messages": [chat[0], {"role": "assistant", "content": f"<think>\n{chat[0]['content']}\n"
         f"</think>\n<answer>\n{chat[1]['content']}\n</answer>"}]} for chat in chats
    ]  # fmt: skip
    for name, records in lines.items():
        (directory / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = train_bpe(iter(texts), vocab_size=290)
    tokenizer.save(directory / "tokenizer")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    save_model(Transformer(ModelConfig(vocab_size=290, **shape)), directory / "base", tokenizer=tokenizer)
    return directory


DATA = {"train_pretrain": "text.jsonl", "train_dpo": "pairs.jsonl", "train_reason": "reason.jsonl"}


def command(stage: str, data: Path, out: Path) -> list[str]:
    flags = {
        "data_path": data / DATA.get(stage, "chat.jsonl"),
        "tokenizer_path": data / "tokenizer", "cache_dir": data / "cache", "save_dir": out, "from_weight": "",
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_seq_len": 24, "batch_size": 2, "accumulation_steps": 2, "max_steps": 9, "save_interval": 2,
        "log_interval": 1, "learning_rate": 0.01, "device": "cpu", "dtype": "float32", "allow_rejected": 1,
    }  # fmt: skip
    if stage in ("train_dpo", "train_reason"):
        flags |= {"from_weight": data / "base", "max_seq_len": 40}
    if stage == "train_dpo":
        flags |= {"learning_rate": 1e-3, "log_interval": 4}  # figures are counted over several steps
    if stage == "train_distill":
        flags |= {"teacher": data / "base", "hidden_weight": 0.3, "on_policy": 0.5, "max_new_tokens": 4}
    if stage == "train_lora":  # dropout draws from torch's generator, PiSSA changes the weights beneath
        flags |= {"from_weight": data / "base", "lora_dropout": 0.2, "lora_init": "pissa", "lora_rank": 3, "monitor": 1}
        flags |= {"replay_path": data / "chat.jsonl", "monitor_interval": 2}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def run(python):
    """Call it with the arguments of ``python``: a process that ran to its end."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return lambda code: subprocess.run([python, *code], env=environment, capture_output=True, text=True, timeout=200)


def outcome(out: Path) -> dict:
    """Return all that a run leaves and that does not depend on the clock."""
    directory = next(out.rglob("metrics.jsonl")).parent
    weights = "adapter_model.safetensors" if directory.parent.name == "lora" else "model.safetensors"
    exact = "trained.safetensors" if directory.parent.name == "lora" else weights
    newest = list_checkpoints(directory / "checkpoints")[0]
    state = torch.load(newest / "training_state.pt", weights_only=True)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    del state["counters"]["seconds"], state["window"]["seconds"]
    return {
        "rows": [{key: value for key, value in row.items() if key not in CLOCK} for row in rows],
        "checkpoint": newest.name,
        "state": state,
        "weights": load_file(newest / exact),
        "exported": load_file(directory / weights),
        "watched": read_metrics(directory / "monitor.jsonl"),
    }


def assert_same(a, b, where: str = "") -> None:
    """Compare nested containers of tensors and values exactly."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}/{index}")
    else:
        assert a == b, where


# Each stage is killed once, and each moment is met. What is said to be killed elsewhere, at random: test_torture.py.
KILLED = {
    "train_pretrain": "before a checkpoint gets its name",
    "train_sft": "between two updates",
    "train_lora": "in the middle of accumulation",
    "train_dpo": "while the weights of a checkpoint are written",
    "train_distill": "after it got its name",
    "train_reason": "in the middle of accumulation",
}


@pytest.mark.parametrize("stage", KILLED)
def test_killed_and_resumed_equals_uninterrupted(stage, data, tmp_path, run):
    whole = run([str(ROOT / f"{stage}.py"), *command(stage, data, tmp_path / "whole")])
    assert whole.returncode == 0, whole.stderr
    expected = outcome(tmp_path / "whole")
    assert [row["step"] for row in expected["rows"]] == ([4, 8, 9] if stage == "train_dpo" else list(range(1, 10)))
    assert bool(expected["watched"]) == (stage == "train_lora")
    out = tmp_path / "killed"
    arguments = command(stage, data, out)
    module, owner, name, call = MOMENTS[KILLED[stage]]
    killed = run(["-c", DEADLY, stage, module, owner, name, str(call), *arguments])
    assert killed.returncode == -9, f"was not killed\n{killed.stderr}"
    assert not [path for path in out.rglob("*model.safetensors") if "checkpoints" not in path.parts]
    resumed = run([str(ROOT / f"{stage}.py"), *arguments, "--from_resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from" in resumed.stdout
    assert_same(outcome(out), expected)
    assert not [path for path in next(out.rglob("checkpoints")).iterdir() if path.name.startswith(".")]


def test_resume_is_exact_with_dropout(tmp_path):
    checks.resume_is_exact(tmp_path)


def test_resume_is_exact_with_experts(tmp_path):
    """The routers' bias and the load counted since the last row are part of a checkpoint: step 4 is amid a window."""
    checks.resume_is_exact(tmp_path, config=MOE_CONFIG, log_interval=3)


def test_without_a_checkpoint_resume_says_so(data, tmp_path, capsys):
    train_pretrain = pytest.importorskip("train_pretrain")
    with pytest.raises(SystemExit) as ended:
        train_pretrain.main([*command("train_pretrain", data, tmp_path / "none"), "--from_resume"])
    assert ended.value.code == 2
    assert "no intact checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, named", [(("--learning_rate", "0.02"), "learning_rate: 0.01 then, 0.02 now"), (("--seed", "7"), "seed")]
)
def test_other_settings_are_refused(data, tmp_path, capsys, change, named):
    train_pretrain = pytest.importorskip("train_pretrain")
    arguments = command("train_pretrain", data, tmp_path)
    train_pretrain.main([*arguments, "--save_interval", "4"])
    with pytest.raises(SystemExit) as ended:
        train_pretrain.main([*arguments, *change, "--from_resume"])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err
