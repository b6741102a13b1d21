"""Adapters from the command line.

python -m minillm.lora merge --model full_sft_512 --adapter cooking_512 --output out/cooking
python -m minillm.lora merge --model MODEL_DIR --adapter cooking_512:0.7 medical_512:0.3 --output BOTH
python -m minillm.lora show --adapter out/lora/cooking_512
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
import tyro

from minillm.errors import UserError, script
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.names import adapters_called, find_adapter, find_weights, run_name
from minillm.hub.vocabulary import grow_for_adapters
from minillm.lora.more.base import BASE
from minillm.lora.more.files import CONFIG, read_adapter
from minillm.lora.more.merge import merge_adapters
from minillm.tokenizer import has_tokenizer, load_tokenizer

# What a model directory holds besides weights and configuration; it is copied into the merged one.
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model",
              "generation_config.json")  # fmt: skip


def merge(
    *,
    model: str,
    adapter: tuple[str, ...],
    output: Path,
    dtype: Literal["as the model", "float32", "bfloat16", "float16"] = "as the model",
    any_base: bool = False,
    save_dir: str = "out",
) -> None:
    """Add adapters to a model's weights and write a Hugging Face directory that everything opens.

    Args:
        model: the model that the adapters were made for: a directory, a stage, a run's name, or ORG/MODEL on a hub.
        adapter: adapters, each a name, a directory or a .pth, with a weight after a colon if there are several.
        output: the new directory.
        dtype: of the written weights; the sum is taken in float32 in any case.
        any_base: merge even if an adapter was made for another model of the same shapes.
        save_dir: directory that holds the run directories, for names.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: it exists already; choose a new directory")
    path = find_weights(model, save_dir=save_dir, hidden_size=512, any_width=True, flag="--model")
    merged = load_model(path)
    merged.origin = str(path)
    folder = path if path.is_dir() else path.parent  # the tokenizer of a .pth is in the same folder
    suffix = run_name("", hidden_size=merged.config.hidden_size, has_experts=bool(merged.config.num_experts))
    adapters = [_path_and_weight(text, save_dir=save_dir, model_suffix=suffix) for text in adapter]
    tokenizer = None
    if has_tokenizer(folder):
        own = load_tokenizer(folder)
        tokenizer = grow_for_adapters(merged, own, adapters)
        tokenizer = None if tokenizer is own else tokenizer
    merge_adapters(merged, adapters, any_base=any_base)
    if dtype == "as the model":
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
        dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
    try:
        save_model(merged, output, tokenizer=tokenizer, dtype=getattr(torch, dtype))
        companions = [file for pattern in COMPANIONS for file in folder.glob(pattern) if tokenizer is None]
        for file in companions:
            if file.is_file():
                shutil.copy2(file, output / file.name)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; choose another path") from None
    print(f"saved {output} ({dtype})")


def show(*, adapter: str, save_dir: str = "out") -> None:
    """Print what an adapter is: its settings, its layers and sizes, and what it was made for.

    Args:
        adapter: a directory, a .pth, or the name of an adapter in SAVE_DIR/lora, with its width or without.
        save_dir: directory that holds the run directories, for names.
    """
    paths = adapters_called(adapter, save_dir=save_dir)
    path = paths[0] if len(paths) == 1 else find_adapter(adapter, save_dir=save_dir, flag="--adapter")
    config, tensors = read_adapter(path)
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    try:
        base = json.loads((path / file).read_text(encoding="utf-8")) if (file := _base_file(path)) else {}
    except ValueError as error:
        raise UserError(f"{path / file} is damaged, copy it again: {error}") from None
    print(f"{path}: {n_parameters:,} parameters")
    print(f"made for: {base.get('base') or base.get('base_model_name_or_path') or 'unknown'}")
    kind = [word for word, is_so in (("DoRA", config.use_dora), ("rsLoRA", config.use_rslora)) if is_so] or ["LoRA"]
    print(f"{' '.join(kind)}: rank {config.rank}, alpha {config.alpha:g}, dropout {config.dropout:g}")
    for name, tensor in sorted(tensors.items()):
        print(f"  {name} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


def _base_file(adapter: Path) -> str | None:
    return next((name for name in (BASE, CONFIG) if (adapter / name).is_file()), None)


def _path_and_weight(text: str, *, save_dir: str, model_suffix: str) -> tuple[Path, float]:
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        name, weight = text, "1"
    try:
        share = float(weight)
    except ValueError:
        raise UserError(f"--adapter {text}: {weight!r} is not a weight; write PATH:0.7") from None
    return find_adapter(name, save_dir=save_dir, model_suffix=model_suffix, flag="--adapter"), share


@script
def main(argv: list[str] | None = None) -> None:
    """Run one of the commands; a ``UserError`` becomes one line on standard error and exit code 2."""
    commands = {"merge": merge, "show": show}
    tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="python -m minillm.lora", use_underscores=True)


if __name__ == "__main__":
    main()
