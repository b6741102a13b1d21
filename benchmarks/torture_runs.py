"""The runs of ``torture.py``: tiny data, a tiny model, the flags of every stage; and the results of a finished run."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from minillm.checkpoints.checkpoint import STATE_FILE, find_damage, list_checkpoints
from minillm.checkpoints.directory import is_earlier
from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.reports.tracking import CLOCK, read_metrics
from minillm.tokenizer import train_bpe

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
STEPS = 12
EXPERTS = {"use_moe": 1, "num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "scoring_func": "sigmoid"}
# The runs: the stage, and the flags that differ from ``COMMON``; {data} is the folder of ``make_data``.
VARIANTS: dict[str, tuple[str, dict]] = {
    "pretraining": ("train_pretrain", {"data_path": "{data}/text.jsonl", "valid_path": "{data}/text_valid.jsonl"}),
    "pretraining, experts": (
        "train_pretrain",
        {"data_path": "{data}/text.jsonl", "valid_path": "{data}/text_valid.jsonl", "log_interval": 3} | EXPERTS,
    ),
    "fine-tuning": ("train_sft", {}),
    "LoRA": (  # dropout draws from torch's generator, PiSSA changes the weights beneath
        "train_lora",
        {"from_weight": "{data}/base", "lora_dropout": 0.2, "lora_init": "pissa", "lora_rank": 3, "monitor": 1,
         "monitor_interval": 2, "replay_path": "{data}/chat.jsonl"},
    ),
    "DPO": (
        "train_dpo",
        {"data_path": "{data}/pairs.jsonl", "valid_path": "{data}/pairs_valid.jsonl", "from_weight": "{data}/base",
         "max_seq_len": 40, "learning_rate": 1e-3, "log_interval": 4},
    ),
    "DPO, reference on disk": (
        "train_dpo",
        {"data_path": "{data}/pairs.jsonl", "from_weight": "{data}/base", "valid_path": "", "max_seq_len": 40,
         "learning_rate": 1e-3, "reference": "cached"},
    ),
    "distillation, on-policy": (
        "train_distill",
        {"teacher": "{data}/base", "hidden_weight": 0.3, "on_policy": 0.5, "max_new_tokens": 4},
    ),
    "distillation, teacher on disk": ("train_distill", {"teacher": "{data}/base", "top_k": 5, "valid_path": ""}),
    "reasoning": (
        "train_reason",
        {"data_path": "{data}/reason.jsonl", "valid_path": "{data}/reason_valid.jsonl", "from_weight": "{data}/base",
         "max_seq_len": 40},
    ),
}  # fmt: skip
COMMON = SHAPE | {
    "data_path": "{data}/chat.jsonl", "valid_path": "{data}/chat_valid.jsonl", "tokenizer_path": "{data}/tokenizer",
    "from_weight": "", "max_seq_len": 24, "batch_size": 2, "accumulation_steps": 2, "max_steps": STEPS,
    "save_interval": 2, "log_interval": 1, "eval_interval": 3, "learning_rate": 0.01, "device": "cpu",
    "dtype": "float32", "allow_rejected": 1,
}  # fmt: skip


def make_data(directory: Path) -> None:
    """Write ragged texts, chats, pairs and reasoning, validation data, a tokenizer, and the weights of a base model."""
    words = ["the", "old", "house", "老", "房子", "stands", "by", "河", "边"]
    texts = [" ".join(words[(n * k) % 9] for k in range(1, 3 + n % 11)) for n in range(44)]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " ".join(text.split()[: 1 + n % 4])}]
        for n, text in enumerate(texts)
    ]
    records = {"text": [{"text": text} for text in texts], "chat": [{"conversations": chat} for chat in chats]}
    records["pairs"] = [
        {"prompt": chat[0]["content"], "chosen": chat[1]["content"], "rejected": f"{chat[1]['content']} 河"}
        for chat in chats
    ]
    form = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
    records["reason"] = [
        {"messages": [chat[0], {"role": "assistant", "content": form.format(*(turn["content"] for turn in chat))}]}
        for chat in chats
    ]
    for name, lines in records.items():
        for file, some in ((f"{name}.jsonl", lines[:36]), (f"{name}_valid.jsonl", lines[36:])):
            (directory / file).write_text("".join(json.dumps(line) + "\n" for line in some), encoding="utf-8")
    tokenizer = train_bpe(iter(texts), vocab_size=290)
    tokenizer.save(directory / "tokenizer")
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig(vocab_size=290, **SHAPE)), directory / "base", tokenizer=tokenizer)


def command(variant: str, data: Path, out: Path, **flags) -> list[str]:
    """Return the arguments of a run of ``variant`` that writes to ``out``."""
    values = COMMON | VARIANTS[variant][1] | {"save_dir": out, **flags}
    return [word for name, value in values.items() for word in (f"--{name}", str(value).format(data=data))]


def habits(rng: random.Random) -> dict:
    """Return flags that change how a run is saved and gets its data, but never its result."""
    return {
        "async_save": int(rng.random() < 0.7),
        "save_minutes": rng.choice([0, 0, 1e-6, 5e-4]),
        "num_workers": int(rng.random() < 0.15),
    }


# ---- what a run has left -----------------------------------------------------------------------------------------


def run_directory(out: Path) -> Path | None:
    """Return the directory of the run that writes to ``out``; None if it does not exist yet."""
    found = [path.parent for path in out.rglob(".lock")]
    return found[0] if found else None


def rows_of(path: Path) -> list[dict]:
    """Return the rows of metrics without the columns that depend on the clock."""
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in read_metrics(path)]


def intact_checkpoints(directory: Path) -> dict[str, int]:
    """Return the intact checkpoints of a run, newest first, with their bytes."""
    paths = [path for path in list_checkpoints(directory / "checkpoints") if find_damage(path) is None]
    return {path.name: bytes_of(path) for path in paths}


def bytes_of(path: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def temporary_files(out: Path) -> list[str]:
    """Return files that should have been renamed or removed, except those that an earlier run has left."""
    paths = (path.relative_to(out) for path in out.rglob("*") if ".tmp" in path.name)
    return sorted(str(path) for path in paths if not is_earlier(path))


def broken_weights(out: Path) -> list[str]:
    """Return the incomplete weight files outside checkpoints; a file gets its final name only when it is complete."""
    broken = []
    for path in out.rglob("*.safetensors"):
        if not any("step-" in part for part in path.parts):
            try:
                with safe_open(path, "pt") as file:
                    list(file.keys())
            except Exception as error:  # any error of the library for a truncated file
                broken.append(f"{path.relative_to(out)}: {error}")
    return broken


def outcome(out: Path, keep_last: int) -> dict:
    """Return the results of a finished run that do not depend on the clock, by name."""
    directory = run_directory(out)
    checkpoints = list_checkpoints(directory / "checkpoints")
    newest = checkpoints[0]
    state = torch.load(newest / STATE_FILE, weights_only=True)
    del state["counters"]["seconds"], state["window"]["seconds"]
    clocks = {"run.yaml", "summary.html", "metrics.jsonl", ".lock", STATE_FILE, "manifest.json"}
    left = {
        "rows of metrics": rows_of(directory / "metrics.jsonl"),
        "looks at the adapter": read_metrics(directory / "monitor.jsonl"),
        "newest checkpoint": newest.name,
        "training state": state,
        "damaged or surplus checkpoints": [path.name for path in checkpoints if find_damage(path)]
        + [path.name for path in checkpoints[keep_last:]],
        "temporary files": temporary_files(out),
        "files": {},
    }
    for path in _files(directory, newest):
        name = str(path.relative_to(directory))
        content = path.read_bytes()
        if path.name == "README.md":  # of the run: its facts name the command, the time, and the folder
            lines = content.decode().splitlines()
            content = "\n".join(line for line in lines if not line.startswith(("| command", "| training time")))
        left["files"][name] = "there" if path.name in clocks else content
    return left


def _files(directory: Path, newest: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        folder = inside.parts[0]
        if path.is_file() and not is_earlier(inside) and (folder != "checkpoints" or newest in path.parents):
            yield path


def first_difference(found, expected, where: str = "") -> str | None:
    """Return the first place where nested containers of tensors and values are not exactly equal; None if nowhere."""
    if type(found) is not type(expected):
        return f"{where}: {type(found).__name__} instead of {type(expected).__name__}"
    if isinstance(found, torch.Tensor):
        return None if torch.equal(found, expected) else f"{where}: other numbers"
    if isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            if key not in found or key not in expected:
                return f"{where}/{key}: {'missing' if key in expected else 'too many'}"
            if difference := first_difference(found[key], expected[key], f"{where}/{key}"):
                return difference
        return None
    if isinstance(found, list | tuple):
        for index, (left, right) in enumerate(zip(found, expected, strict=False)):
            if difference := first_difference(left, right, f"{where}/{index}"):
                return difference
        return None if len(found) == len(expected) else f"{where}: {len(found)} instead of {len(expected)}"
    if isinstance(found, bytes):
        return None if found == expected else f"{where}: other bytes"
    return None if found == expected else f"{where}: {found!r} instead of {expected!r}"
