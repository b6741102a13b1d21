"""Models on disk: Hugging Face directories, read and written; plain ``.pth`` state dicts, read.

Our parameter names are theirs, so nothing is renamed. Tied matrices are stored once.
"""

import json
import os
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED = "lm_head.weight"


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> Transformer:
    """Return the model stored in a Hugging Face directory (sharded or not), or in a ``.pth`` state dict.

    Args:
        config: needed for a ``.pth``, which holds weights alone; a directory has its own.

    Raises:
        UserError: no weights there, a missing shard, an unsupported configuration, or weights that do not fit
            it (the first three names, with both shapes).
    """
    path = Path(path)
    if path.is_dir():
        config = ModelConfig.from_hf(path)
        weights = _read_directory(path)
    elif path.is_file() and config is not None:
        weights = _read_pth(path)
    elif path.is_file():
        raise UserError(f"{path} holds weights alone: give the model's configuration too")
    else:
        raise UserError(f"no model at {path}: neither a directory nor a .pth file")
    with torch.device("meta"):
        model = Transformer(config)
    if config.tie_word_embeddings:
        weights.pop(TIED, None)
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    _check_fit(path, expected, {name: tensor.shape for name, tensor in weights.items()})
    model.load_state_dict(weights, assign=True, strict=False)  # strict was _check_fit; a tied matrix comes once
    model.tie_weights()
    return model.requires_grad_(True)


def save_model(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 2**30,
) -> None:
    """Write ``model`` as a Hugging Face directory that transformers opens as it is.

    Each file appears under its name only when it is whole.

    Args:
        tokenizer: saved beside the model, and its end tokens written to ``generation_config.json``.
        dtype: of the stored weights; default: the model's. max_shard_size: bytes per weight file.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dtype = dtype or next(iter(weights.values())).dtype
    weights = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items()}
    written = _write_weights(weights, path, max_shard_size)
    for stale in path.glob("model*.safetensors*"):  # shards of an earlier, larger or smaller save
        if stale.name not in written:
            stale.unlink()
    config = model.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(path / "config.json", config)
    generation = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    if tokenizer is not None:
        tokenizer.save(path)
        generation["eos_token_id"] = [tokenizer.eos_token_id, tokenizer.im_end_id]
        generation["pad_token_id"] = tokenizer.eos_token_id
    _write_json(path / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def _write_weights(weights: dict[str, Tensor], path: Path, max_shard_size: int) -> set[str]:
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_size
    for name, tensor in weights.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    if len(shards) == 1:
        _write_shard(shards[0], path / WEIGHTS)
        return {WEIGHTS}
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(shard, path / name)
    total = sum(tensor.nbytes for tensor in weights.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {*names, INDEX}


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(shard, temporary, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's errors, a full disk among them
        temporary.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    os.replace(temporary, path)


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _read_directory(path: Path) -> dict[str, Tensor]:
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / INDEX} is damaged, copy it again: {error!r}") from error
    elif (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise UserError(f"no weights in {path}: neither {WEIGHTS} nor {INDEX} is there")
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path / INDEX} names {name}, which is missing: copy that shard too")
        try:
            weights |= load_file(path / name)
        except SafetensorError as error:
            raise UserError(f"{path / name} is damaged: {error}") from error
    return weights


def _read_pth(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is not a plain state dict of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a plain state dict of tensors")
    return weights


def _check_fit(path: Path, expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the weights of {path} do not fit their configuration: {'; '.join(problems[:3])}{more}")
