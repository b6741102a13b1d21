"""Models on disk: Hugging Face directories, read and written; plain ``.pth`` state dicts, read.

Our parameter names are theirs, but for the experts, which their files hold one by one (``experts_on_disk.py``). Tied
matrices are stored once.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm.config import ModelConfig
from minillm.config.experts_on_disk import (
    SHARED,
    SHARED_GATE,
    Piece,
    pieces_of,
    pieces_of_minimind,
    prediction_layer_names,
    zero_gates,
)
from minillm.errors import UserError
from minillm.files import use_umask
from minillm.hub.pth import load_pth
from minillm.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = "pytorch_model.bin"  # as older releases wrote it, and MiniMind's export does: a .pth by another name
TIED = "lm_head.weight"
IGNORED = (".rotary_emb.inv_freq",)  # old checkpoints hold this table; ours follows from the configuration


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> Transformer:
    """Return the model stored in a Hugging Face directory (sharded or not), or in a ``.pth`` state dict.

    A directory without safetensors may hold one ``pytorch_model.bin``, which is read like a ``.pth``.

    Tensors are read one at a time, each into its place, so that the weights lie in memory once.

    Args:
        config: needed for a ``.pth``, which holds weights alone; a directory has its own.

    Raises:
        UserError: no weights there, a missing shard, an unsupported configuration, or weights that do not fit
            it (the first three names, with both shapes).
    """
    path = Path(path)
    if path.is_dir():
        config = ModelConfig.from_hf(path)
        stored = _open_directory(path, config)
    elif path.is_file() and config is not None:
        stored = _open_pth(path, config)
    elif path.is_file():
        raise UserError(f"{path} holds weights alone: give the model's configuration too, e.g. infer_config(path)")
    else:
        raise UserError(f"no model at {path}: neither a directory nor a .pth file")
    ignored = prediction_layer_names(stored, config)
    ignored |= {name for name in stored if name.endswith(IGNORED) or (config.tie_word_embeddings and name == TIED)}
    stored = {name: source for name, source in stored.items() if name not in ignored}
    with torch.device("meta"):
        model = Transformer(config)
    state = _state(model)
    has_gates = any(name.endswith(SHARED_GATE) for name in stored)
    pieces = {name: _pieces(name, config, stored, has_gates) for name in state}
    expected = {piece.name: state[name][piece.index].shape for name in state for piece in pieces[name]}
    is_of_family = has_gates or (path.is_dir() and any(SHARED in name for name in stored))
    gates = zero_gates(config) if is_of_family else []
    expected |= dict.fromkeys(gates, torch.Size((1, config.hidden_size)))
    _check_fit(path, expected, {name: source.shape for name, source in stored.items()})
    for name in gates:
        if stored[name].read().any():
            raise UserError(
                f"{path}: {name} is not zero, but the configuration says shared_expert_gate false: the gate was "
                f"trained since, set it to true"
            )
    buffers = dict(model.named_buffers())
    for name, tensor in state.items():
        as_dtype = torch.promote_types(dtype, torch.float32) if name in buffers else dtype
        state[name] = _read(pieces[name], stored, tensor.shape, as_dtype, device)
    model.load_state_dict(state, assign=True, strict=False)  # strict was _check_fit; a tied matrix comes once
    model.generation_config = _read_generation(path)
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
        tokenizer: saved next to the model; its end tokens are added to ``generation_config.json``, which otherwise
            stays what the model came with.
        dtype: of the stored weights; default: the model's. The correction biases of routers stay float32 at least.
        max_shard_size: bytes per weight file; so much is copied at a time if the weights are elsewhere or other.

    Raises:
        UserError: a weight is not finite, or would not be in ``dtype``; the model has an adapter. Nothing is written.
    """
    path = Path(path)
    if any(".lora." in name for name, _ in model.named_parameters()):
        raise UserError(
            f"the model has an adapter, which {path} could not hold: merge_lora(model, keep_base=False) first, or "
            f"write the adapter alone with save_lora"
        )
    dtype = dtype or next(model.parameters()).dtype
    weights = _pieces_to_write(model, dtype)
    _check_finite(weights)
    path.mkdir(parents=True, exist_ok=True)
    written = _write_weights(weights, path, max_shard_size)
    for stale in path.glob("model*.safetensors*"):  # shards of an earlier, larger or smaller save
        if stale.name not in written:
            stale.unlink()
    config = model.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(path / "config.json", config)
    if tokenizer is not None:
        tokenizer.save(path)
    _write_json(path / GENERATION, _generation_config(model, tokenizer))


def _generation_config(model: Transformer, tokenizer) -> dict:
    """Return what the model came with (its temperature, say), with the tokens that end its answers now."""
    came_with = model.generation_config
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    ends = came_with.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer is not None:
        ids["pad_token_id"] = tokenizer.pad_token_id
        if not set(tokenizer.end_ids) <= set(ends):
            ids["eos_token_id"] = list(dict.fromkeys([*ends, *tokenizer.end_ids]))
            came_with = {key: value for key, value in came_with.items() if key != "eos_token_id"}
    return {key: value for key, value in (ids | came_with).items() if value is not None}


def _read_generation(path: Path) -> dict:
    """Return the content of a directory's generation_config.json; empty where it is missing or broken."""
    try:
        content = json.loads((path / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(model: Transformer) -> dict[str, Tensor]:
    """Return all that is stored: the parameters, a tied one once, and the buffers (correction biases)."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


# ---- writing ---------------------------------------------------------------------------------------


def _pieces_to_write(model: Transformer, dtype: torch.dtype) -> dict[str, tuple[Tensor, torch.dtype, float]]:
    """Return the tensors under their names on disk, as parts of the model's; dtype and scale of each there."""
    buffers = dict(model.named_buffers())
    wide = torch.promote_types(dtype, torch.float32)
    weights = {
        piece.name: (tensor.detach()[piece.index], wide if name in buffers else dtype, piece.scale)
        for name, tensor in _state(model).items()
        for piece in pieces_of(name, model.config)
    }
    dim = model.config.hidden_size
    return weights | {name: (torch.zeros(1, dim), dtype, 1.0) for name in zero_gates(model.config)}


def _write_weights(weights: dict[str, tuple[Tensor, torch.dtype, float]], path: Path, max_shard_size: int) -> set[str]:
    sizes = {name: tensor.numel() * dtype.itemsize for name, (tensor, dtype, _) in weights.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        tensors = {key: _as_stored(*weights[key]) for key in shard}
        _write_shard(tensors, path / name)
    if len(shards) == 1:
        return {WEIGHTS}
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    _write_json(path / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return {*names, INDEX}


def _as_stored(tensor: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    return (tensor if scale == 1 else tensor * scale).to("cpu", dtype).contiguous()


def _check_finite(weights: dict[str, tuple[Tensor, torch.dtype, float]]) -> None:
    """Raise UserError unless every number is finite, and stays so in the dtype it is stored in."""
    for name, (tensor, dtype, scale) in weights.items():
        low, high = (bound.item() * scale for bound in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{name} has numbers that are not finite: nothing was written; take older weights")
        if max(-low, high) > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} has the number {max(-low, high):.3g}, and {short} ends at {torch.finfo(dtype).max:.3g}: "
                f"nothing was written; choose bfloat16 or float32"
            )


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        save_file(shard, temporary, metadata={"format": "pt"})
        use_umask(temporary)
    except SafetensorError as error:  # it wraps the system's errors, a full disk among them
        temporary.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    os.replace(temporary, path)


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# ---- reading ---------------------------------------------------------------------------------------


class _InMemory(NamedTuple):
    """A tensor that was read already."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self) -> Tensor:
        return self.tensor


class _InFile(NamedTuple):
    """A tensor in an open safetensors file: its shape is known, its numbers are read when asked for."""

    file: Any
    name: str

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def _pieces(name: str, config: ModelConfig, stored: Mapping[str, Any], has_gates: bool) -> list[Piece]:
    """Return the pieces of a parameter in the layout that ``stored`` has."""
    if name in stored and not (has_gates and pieces_of(name, config)[0].scale != 1):
        return [Piece(name)]  # a state dict of ours holds the experts as they lie in memory
    return (None if has_gates else pieces_of_minimind(name, config, stored)) or pieces_of(name, config)


def _open_pth(path: Path, config: ModelConfig) -> dict[str, _InMemory]:
    return {name: _InMemory(tensor) for name, tensor in load_pth(path, config).items()}


def _open_directory(path: Path, config: ModelConfig) -> Mapping[str, _InFile | _InMemory]:
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / INDEX} is damaged, copy it again: {error!r}") from error
    elif (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (path / PICKLED).is_file():
        return _open_pth(path / PICKLED, config)
    else:
        raise UserError(f"no weights in {path}: neither {WEIGHTS} nor {INDEX} nor {PICKLED} is there")
    stored: dict[str, _InFile] = {}
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path / INDEX} names {name}, which is missing: copy that shard too")
        try:
            file = safe_open(path / name, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path / name} is damaged, copy it again: {error}") from error
        stored |= {key: _InFile(file, key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
    return stored


def _read(
    pieces: list[Piece],
    stored: Mapping[str, _InMemory | _InFile],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return one parameter, of ``shape``, put together from its pieces."""
    if pieces[0].index == ():
        whole = stored[pieces[0].name].read().to(device=device, dtype=dtype)
        return whole if pieces[0].scale == 1 else whole / pieces[0].scale
    whole = torch.empty(shape, dtype=dtype, device=device)
    for name, index, _ in pieces:
        whole[index].copy_(stored[name].read())
    return whole


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
        raise UserError(
            f"the weights of {path} do not fit their configuration, take both from one model: "
            f"{'; '.join(problems[:3])}{more}"
        )
