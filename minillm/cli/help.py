"""Formats ``--help``: flags in groups, the most used first, each with its default."""

import dataclasses
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from tyro._docstrings import get_field_docstring

# A flag belongs to the first group with a prefix of its name. Flags without a group belong to "this command", after the
# most used ones.
MOST_USED = (
    "data_path", "valid_path", "from_weight", "model", "teacher", "model_mode", "lora_name", "prompt", "prompts",
    "preset", "save_dir", "run_name", "epochs", "batch_size", "learning_rate", "max_seq_len", "from_resume", "dry_run",
    "output",
)  # fmt: skip
GROUPS = {
    "data": ("tokenizer_path", "cache_dir", "strict", "packing", "train_on", "replay_", "add_tokens", "chat_template"),
    "model": (
        "hidden_", "num_hidden", "num_attention", "num_key", "intermediate", "tie_word", "use_qk", "use_moe",
        "num_experts", "moe_", "n_shared", "scoring_func", "first_k", "norm_topk", "rope_", "vocab_size",
    ),
    "adapter": ("lora", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora",
                "base_dtype", "monitor", "balance_gradients"),
    "optimisation": (
        "max_steps", "accumulation", "global_batch", "lr_", "warmup", "min_lr", "decay_", "weight_decay", "adam_",
        "grad_clip", "router_", "seed",
    ),
    "precision and device": ("dtype", "device", "compile", "gradient_checkpointing", "num_workers", "num_threads"),
    "parallel": ("parallel", "deepspeed", "zero", "fsdp", "timeout", "ranks"),
    "checkpoints": ("save_", "keep_last", "async_save", "overwrite"),
    "validation": ("eval_", "patience", "sample_prompts", "suite_dir"),
    "logging": ("log_", "tracker", "project", "use_wandb", "wandb", "profile"),
}  # fmt: skip


def program() -> str:
    """Return the command that started this process: ``python train_sft.py``, ``python -m minillm.plan``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.startswith("minillm"):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    path = Path(sys.argv[0])
    relative = Path(os.path.relpath(path)) if path.is_absolute() else path
    return f"python {path.name if '..' in relative.parts else relative}"


def format_help(cls: type) -> str:
    """Return the help text of a dataclass of arguments, as wide as the terminal (at most 120 characters)."""
    width = min(120, shutil.get_terminal_size().columns)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    lines = [f"usage: {program()} [--config FILE] [--FLAG VALUE ...]", "", (cls.__doc__ or "").strip(), ""]
    for title, names in _grouped(list(fields)).items():
        lines.append(f"{title}:")
        if title == "most used":
            lines += _entry("--config FILE", "Values by name from a YAML file; flags override them.", width)
        for name in names:
            lines += _entry(f"--{name} {_kind(get_type_hints(cls)[name])}", _text(cls, fields[name]), width)
        lines.append("")
    return "\n".join(lines).rstrip()


def _grouped(names: list[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"most used": [name for name in MOST_USED if name in names], "this command": []}
    groups |= {title: [] for title in GROUPS}
    for name in names:
        if name not in groups["most used"]:
            title = next((title for title, prefixes in GROUPS.items() if name.startswith(prefixes)), "this command")
            groups[title].append(name)
    return {title: members for title, members in groups.items() if members or title == "most used"}


def _entry(flag: str, text: str, width: int) -> list[str]:
    indent = 32
    head = f"  {flag}"
    body = textwrap.wrap(text, width - indent) or [""]
    if len(head) < indent - 1:
        return [head.ljust(indent) + body[0], *(" " * indent + line for line in body[1:])]
    return [head, *(" " * indent + line for line in body)]


def _kind(kind) -> str:
    if type(None) in get_args(kind):
        kind = next(choice for choice in get_args(kind) if choice is not type(None))
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) is tuple:
        return "TEXT ..."
    return {bool: "[0|1]", int: "INT", float: "FLOAT", str: "TEXT"}.get(kind, "VALUE")


def _text(cls: type, field: dataclasses.Field) -> str:
    text = " ".join((get_field_docstring(cls, field.name, ()) or "").split())
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"{text} (required)"
    default = field.default
    if "default:" in text or default in (None, "", ()) or default is dataclasses.MISSING:
        return text
    return f"{text} (default: {int(default) if isinstance(default, bool) else default})"
