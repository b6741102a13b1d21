"""Opens a model with its tokenizer and adapters: ``open_model``, and for programs ``open_from_arguments``."""

import json
from pathlib import Path
from typing import Any

import torch

from minillm.config import PRESETS, ModelConfig
from minillm.errors import UserError
from minillm.hardware import keep_freed_memory
from minillm.hub.adapters import find_adapters
from minillm.hub.huggingface import load_model
from minillm.hub.names import (
    DEMO,
    DEMO_WIDTH,
    adapters_called,
    describe_unfinished,
    find_weights,
    has_run,
    how_to_make,
    is_model,
)
from minillm.hub.pth import config_beside
from minillm.hub.vocabulary import grow_for_adapters
from minillm.hub.weights import check_tokenizer, preset_config, pth_config, scale_positions
from minillm.lora.more.base import BASE
from minillm.lora.more.merge import merge_adapters
from minillm.model.sizes import describe_parameters
from minillm.model.transformer import Transformer
from minillm.precision import choose_device, choose_dtype
from minillm.tokenizer import Tokenizer, has_tokenizer, load_tokenizer

STAGES = ("pretrain", "full_sft", "rlhf", "reason")  # by --model_mode


def open_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    lora_name: str = "",
    tokenizer_path: str = "",
    save_dir: str = "out",
    flag: str = "path",
) -> tuple[Transformer, Tokenizer]:
    """Return the model, in evaluation mode on its device, and its tokenizer.

    Args:
        path: a model directory, a ``.pth`` with its configuration next to it, a stage (``full_sft``) or a run
            (``full_sft_512``) in ``save_dir``, or a model on a hub (``Qwen/Qwen3-0.6B``), which is downloaded.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: of the weights: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        lora_name: adapters to merge into the weights: a name, a directory or a ``.pth``, or several with weights
            (``cooking:0.7,medical:0.3``).
        tokenizer_path: directory of the tokenizer; default: the model's own, else SAVE_DIR/tokenizer.
        save_dir: directory that holds the runs and their adapters.
        flag: the flag that gave the path, for messages.

    Raises:
        UserError: no such weights, tokenizer or adapter, or they do not belong together.
    """
    hidden_size = PRESETS["small"]["hidden_size"]  # of a stage's runs, this one or the only one
    weights = find_weights(str(path), save_dir=save_dir, hidden_size=hidden_size, any_width=True, flag=flag)
    chosen_device = choose_device(device)
    model, tokenizer, _ = _open(
        weights,
        device=chosen_device,
        dtype=choose_dtype(dtype, chosen_device),
        lora_name=lora_name,
        tokenizer_path=tokenizer_path,
        save_dir=save_dir,
    )
    return model, tokenizer


def open_from_arguments(args: Any) -> tuple[Transformer, Tokenizer, Path]:
    """Return the model, as ``open_model``, the tokenizer and the path of the weights, for a program; print their names.

    Args:
        args: ``OpenArguments``. If ``from_weight`` is empty, ``model_mode`` names the stage. Of a stage's runs, the one
            with the width of the flags is opened, or the only one.

    Raises:
        UserError: no such weights, tokenizer or adapter, or they do not belong together.
    """
    path, save_dir = _find_weights(args)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    model, tokenizer, adapter_paths = _open(
        path,
        device=device,
        dtype=dtype,
        lora_name=args.lora_name,
        tokenizer_path=args.tokenizer_path,
        save_dir=save_dir,
        args=args,
    )
    names = " + ".join(map(str, [path, *adapter_paths]))
    print(f"{names}: parameters {describe_parameters(model)}; {device}, {dtype}")
    return model, tokenizer, path


def _open(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    lora_name: str,
    tokenizer_path: str,
    save_dir: str,
    args: Any = None,
) -> tuple[Transformer, Tokenizer, list[Path]]:
    """Return the model at ``path`` with its adapters merged, its tokenizer, and the paths of the adapters.

    Args:
        args: a program's arguments, for the shape of a ``.pth`` without a ``config.json``, and for ``--rope_scaling``.
    """
    model_dir = path if path.is_dir() else path.parent
    default_tokenizer = model_dir if has_tokenizer(model_dir) else Path(save_dir) / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_path or default_tokenizer)
    config = None
    if path.suffix == ".pth":
        if args is None:
            config = ModelConfig.from_hf(config_beside(path) or model_dir)
        else:
            config = pth_config(path, args, tokenizer)
    # An adapter is merged in float32: its changes can be smaller than the last digit of bfloat16.
    load_dtype = torch.float32 if lora_name else dtype
    model = load_model(path, device=device, dtype=load_dtype, config=config).eval()
    model.origin = str(path)
    check_tokenizer(tokenizer, model, path)
    adapters = find_adapters(model, lora_name, save_dir=save_dir) if lora_name else []
    tokenizer = grow_for_adapters(model, tokenizer, adapters)
    if args is not None:
        model.config = scale_positions(model.config, args)
    if lora_name:
        merge_adapters(model, adapters)  # merged, they cost no time per token
    return model.to(dtype), tokenizer, [path for path, _ in adapters]


def _base_of_adapter(args: Any) -> str:
    """Return the model on which the only adapter of ``--lora_name`` was trained, if it exists; else an empty string."""
    paths = adapters_called(args.lora_name, save_dir=args.save_dir) if args.lora_name else []
    if len(paths) != 1 or not (paths[0] / BASE).is_file():
        return ""
    try:
        base = str(json.loads((paths[0] / BASE).read_text(encoding="utf-8"))["base"])
    except (ValueError, TypeError, KeyError):
        return ""  # merge_adapters will report the problem
    return base if is_model(Path(base)) else ""


def _find_weights(args: Any) -> tuple[Path, str]:
    """Return the path of the weights, and the directory of runs with them and their adapters.

    Without ``--save_dir``, the demo's runs are used if ``out/`` has none of that stage or name.
    """
    stage, save_dir = args.from_weight or _base_of_adapter(args) or STAGES[args.model_mode], args.save_dir
    config = preset_config(args)
    hidden_size = config.hidden_size
    has_name = any(path.name.startswith(f"{stage}_") for path in Path(save_dir).glob("*"))
    exists = Path(stage).exists() or has_run(stage, save_dir) or has_name
    if save_dir == "out" and not exists:
        if has_run(stage, DEMO):
            save_dir = DEMO
            if args.hidden_size is None:  # the demo has a second, smaller pretrained model to compare with
                hidden_size = DEMO_WIDTH
            print(f"no {stage} weights in out/: using the demo's, in {DEMO}/")
        elif not args.from_weight:
            commands = f"run `make demo` for a small example, or {how_to_make(stage, save_dirs=['out', DEMO])}"
            problem = describe_unfinished(stage, DEMO, flag="--from_weight") or commands
            raise UserError(f"no {stage} weights in out/ or {DEMO}/: {problem}, or give --from_weight a directory")
    path = find_weights(
        stage,
        save_dir=save_dir,
        hidden_size=hidden_size,
        has_experts=args.has_experts,
        any_width=args.hidden_size is None,
    )
    return path, _directory_of_adapters(args.lora_name, save_dir, model_dir=str(path.parent))


def _directory_of_adapters(lora_name: str, save_dir: str, *, model_dir: str) -> str:
    """Return ``save_dir``, or the directory of the model if that has the adapters and ``save_dir`` none."""
    names = [part.partition(":")[0].strip() for part in lora_name.split(",")] if lora_name else []
    in_save_dir, in_model_dir = ([adapters_called(n, save_dir=where) for n in names] for where in (save_dir, model_dir))
    return model_dir if names and all(in_model_dir) and not any(in_save_dir) else save_dir
