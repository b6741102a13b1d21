"""Reads and writes Hugging Face directories; also reads plain ``.pth`` state dicts.

Our parameter names are Hugging Face's, except for the experts, which their files store one by one
(``experts_on_disk.py``). Tied matrices are stored once.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm.config import ModelConfig
from minillm.config.experts_on_disk import (
    MATRIX_NAMES,
    SHARED,
    SHARED_GATE,
    USUAL_MATRIX_NAMES,
    Piece,
    pieces_of,
    pieces_of_minimind,
    prediction_layer_names,
    zero_gates,
)
from minillm.errors import UserError
from minillm.files import atomic_file, replace_text, system_errors, use_umask
from minillm.hub.pth import load_pth
from minillm.model.transformer import Transformer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
PICKLED = "pytorch_model.bin"  # from older releases and MiniMind's export: a .pth with another name
PICKLED_INDEX = "pytorch_model.bin.index.json"
TIED = "lm_head.weight"
IGNORED = (".rotary_emb.inv_freq",)  # a table in old checkpoints; ours follows from the configuration


def load_model(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: ModelConfig | None = None,
) -> Transformer:
    """Return the model in a Hugging Face directory (sharded or not), or in a ``.pth`` state dict.

    A directory without safetensors may hold ``pytorch_model.bin`` or its shards, read like a ``.pth``. Tensors are
    read one at a time, each directly into its parameter, so that the weights are in memory once.

    Args:
        config: required for a ``.pth``, which holds only weights; a directory has its own.

    Raises:
        UserError: no weights, a missing shard, an unsupported configuration, or weights that do not fit it (the message
            gives the first three names, with both shapes).
    """
    path = Path(path)
    weights = open_weights(path, config=config)
    with torch.device("meta"):
        model = Transformer(weights.config)
    buffers = dict(model.named_buffers())
    state = {}
    for name in weights.shapes:
        tensor_dtype = torch.promote_types(dtype, torch.float32) if name in buffers else dtype
        state[name] = weights.read(name, dtype=tensor_dtype, device=device)
    # _check_fit was strict; here a tied matrix has only one of its names.
    model.load_state_dict(state, assign=True, strict=False)
    model.generation_config = read_generation(path)
    model.tie_weights()
    return model.requires_grad_(True)


class Weights(NamedTuple):
    """The weights of a model on disk, not yet read. Names and shapes are those of our ``Transformer``."""

    config: ModelConfig
    shapes: dict[str, torch.Size]  # of parameters (a tied one once) and buffers
    pieces: dict[str, list[Piece]]  # the stored tensors that each consists of
    stored: Mapping[str, Any]

    def read(self, name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Return one parameter or buffer; nothing else is read."""
        return _read(self.pieces[name], self.stored, self.shapes[name], dtype, device)


def open_weights(path: str | Path, *, config: ModelConfig | None = None) -> Weights:
    """Return the weights in a directory or ``.pth``, not yet read; arguments and errors are those of ``load_model``."""
    path = Path(path)
    if path.is_dir():
        config = ModelConfig.from_hf(path)
        stored = _open_directory(path, config)
    elif path.is_file() and config is not None:
        stored = _open_pth(path, config)
    elif path.is_file():
        raise UserError(f"{path} holds only weights: also give the model's configuration, e.g. infer_config(path)")
    else:
        raise UserError(f"no model at {path}: neither a directory nor a .pth file")
    ignored = prediction_layer_names(stored, config)
    ignored |= {name for name in stored if name.endswith(IGNORED) or (config.tie_word_embeddings and name == TIED)}
    stored = {name: source for name, source in stored.items() if name not in ignored}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in _state(Transformer(config)).items()}
    has_gates = any(name.endswith(SHARED_GATE) for name in stored)
    pieces = {name: _pieces(name, config, stored, has_gates) for name in shapes}
    whole = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    expected = {piece.name: whole[name][piece.index].shape for name in shapes for piece in pieces[name]}
    is_of_family = has_gates or (path.is_dir() and any(SHARED in name for name in stored))
    gates = zero_gates(config) if is_of_family else []
    expected |= dict.fromkeys(gates, torch.Size((1, config.hidden_size)))
    _check_fit(path, expected, {name: source.shape for name, source in stored.items()})
    for name in gates:
        if stored[name].read().any():
            raise UserError(
                f"{path}: {name} is not zero, but the configuration has shared_expert_gate false: the gate has been "
                f"trained, set it to true"
            )
    return Weights(config, shapes, pieces, stored)


def save_model(
    model: Transformer,
    path: str | Path,
    *,
    tokenizer=None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 2**30,
) -> None:
    """Write ``model`` as a Hugging Face directory that transformers opens. Each file is written atomically.

    Args:
        tokenizer: saved next to the model. Its end tokens are added to ``generation_config.json``, which is otherwise
            that of the loaded model.
        dtype: of the stored weights; default: the model's. The correction biases of routers are at least float32.
        max_shard_size: bytes per weight file; also the size of the copy if device or dtype differ.

    Raises:
        UserError: a weight is not finite, or not finite in ``dtype``; or the model has an adapter. Nothing is written.
    """
    path = Path(path)
    if any(".lora." in name for name, _ in model.named_parameters()):
        raise UserError(
            f"the model has an adapter, which {path} cannot hold: call merge_lora(model, keep_base=False) first, or "
            f"save only the adapter with save_lora"
        )
    dtype = dtype or next(model.parameters()).dtype
    weights = _pieces_to_write(model, dtype)
    _check_finite(weights)
    path.mkdir(parents=True, exist_ok=True)
    file_names = _write_weights(weights, path, max_shard_size)
    for old_file in path.glob("model*.safetensors*"):  # shards of an earlier save
        if old_file.name not in file_names:
            old_file.unlink()
    config = model.config.to_hf() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(path / "config.json", config)
    if tokenizer is not None:
        tokenizer.save(path)
    _write_json(path / GENERATION, _generation_config(model, tokenizer))


def save_pth(model: Transformer, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write ``model`` as one state dict, atomically: ``load_model`` reads it, and so does MiniMind if it has the shape.

    The names are Hugging Face's, for experts those of most families (``mlp.experts.0.gate_proj.weight``). A tied matrix
    has both of its names, which share its numbers. Arguments and errors are those of ``save_model``.
    """
    path = Path(path)
    weights = _pieces_to_write(model, dtype or next(model.parameters()).dtype)
    _check_finite(weights)
    tensors = {_usual_name(name): _as_stored(*piece) for name, piece in weights.items()}
    if model.config.tie_word_embeddings:
        tensors[TIED] = tensors["model.embed_tokens.weight"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, system_errors(), temporary.open("wb") as file:
        torch.save(tensors, file)


def _usual_name(name: str) -> str:
    """Return a name as a ``.pth`` has it: Mixtral's own names of experts are in its directories only."""
    for theirs, usual in zip(MATRIX_NAMES["mixtral"], USUAL_MATRIX_NAMES, strict=True):
        name = re.sub(rf"\.block_sparse_moe\.(experts\.\d+)\.{theirs}\.", rf".mlp.\1.{usual}.", name)
    return name.replace(".block_sparse_moe.", ".mlp.")


def _generation_config(model: Transformer, tokenizer) -> dict:
    """Return the loaded model's settings (such as its temperature), with the tokens that end its answers now."""
    loaded = model.generation_config
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    ends = loaded.get("eos_token_id")
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]
    if tokenizer is not None:
        ids["pad_token_id"] = tokenizer.pad_token_id
        if not set(tokenizer.end_ids) <= set(ends):
            ids["eos_token_id"] = list(dict.fromkeys([*ends, *tokenizer.end_ids]))
            loaded = {key: value for key, value in loaded.items() if key != "eos_token_id"}
    return {key: value for key, value in (ids | loaded).items() if value is not None}


def read_generation(path: Path) -> dict:
    """Return the content of a directory's generation_config.json; empty if it is missing or broken."""
    try:
        content = json.loads((path / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _state(model: Transformer) -> dict[str, Tensor]:
    """Return all tensors to store: the parameters (a tied one once) and the buffers (correction biases)."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


# ---- writing ---------------------------------------------------------------------------------------


def _pieces_to_write(model: Transformer, dtype: torch.dtype) -> dict[str, tuple[Tensor, torch.dtype, float]]:
    """Return {name on disk: (part of a parameter, its dtype on disk, its scale on disk)}."""
    buffers = dict(model.named_buffers())
    buffer_dtype = torch.promote_types(dtype, torch.float32)
    weights = {
        piece.name: (tensor.detach()[piece.index], buffer_dtype if name in buffers else dtype, piece.scale)
        for name, tensor in _state(model).items()
        for piece in pieces_of(name, model.config)
    }
    dim = model.config.hidden_size
    return weights | {name: (torch.zeros(1, dim), dtype, 1.0) for name in zero_gates(model.config)}


def _write_weights(weights: dict[str, tuple[Tensor, torch.dtype, float]], path: Path, max_shard_size: int) -> set[str]:
    """Write the weights to one or several files; return the names of the files."""
    sizes = {name: tensor.numel() * dtype.itemsize for name, (tensor, dtype, _) in weights.items()}
    shards: list[list[str]] = [[]]
    n_free = max_shard_size  # bytes left in the last shard
    for name, size in sizes.items():
        if size > n_free and shards[-1]:
            shards.append([])
            n_free = max_shard_size
        shards[-1].append(name)
        n_free -= size
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
    """Raise UserError unless every number is finite, also in the dtype in which it is stored."""
    for name, (tensor, dtype, scale) in weights.items():
        low, high = (bound.item() * scale for bound in tensor.aminmax()) if tensor.numel() else (0.0, 0.0)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{name} has numbers that are not finite: nothing was written; use older weights")
        if max(-low, high) > torch.finfo(dtype).max:
            dtype_name = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{name} has the number {max(-low, high):.3g}, and {dtype_name} ends at {torch.finfo(dtype).max:.3g}: "
                f"nothing was written; choose bfloat16 or float32"
            )


def _write_shard(shard: dict[str, Tensor], path: Path) -> None:
    with atomic_file(path) as temporary:
        with system_errors():
            save_file(shard, temporary, metadata={"format": "pt"})
        use_umask(temporary)


def _write_json(path: Path, content: dict) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")


# ---- reading ---------------------------------------------------------------------------------------


class _InMemory(NamedTuple):
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self) -> Tensor:
        return self.tensor


class _Mapped(NamedTuple):
    """A tensor in a file that is mapped into memory; ``read`` copies its numbers."""

    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    def read(self) -> Tensor:
        return self.tensor.clone()


class _InFile(NamedTuple):
    """A tensor in an open safetensors file; ``read`` loads its numbers."""

    file: Any
    name: str

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


def _pieces(name: str, config: ModelConfig, stored: Mapping[str, Any], has_gates: bool) -> list[Piece]:
    """Return the pieces of a parameter in the layout of ``stored``."""
    if name in stored and not (has_gates and pieces_of(name, config)[0].scale != 1):
        return [Piece(name)]  # our own state dicts store the experts as in memory
    minimind_pieces = None if has_gates else pieces_of_minimind(name, config, stored)
    return minimind_pieces or pieces_of(name, config)


def _open_pth(path: Path, config: ModelConfig) -> dict[str, _InMemory]:
    return {name: _InMemory(tensor) for name, tensor in load_pth(path, config).items()}


def _open_directory(path: Path, config: ModelConfig) -> Mapping[str, _InFile | _InMemory | _Mapped]:
    if (path / INDEX).is_file():
        names = _shards_of(path / INDEX)
    elif (path / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif (path / PICKLED).is_file():
        return _open_pth(path / PICKLED, config)
    elif (path / PICKLED_INDEX).is_file():
        shards = [path / name for name in _shards_of(path / PICKLED_INDEX)]
        weights = load_pth(path / PICKLED_INDEX, config, shards=shards)
        return {name: _Mapped(tensor) for name, tensor in weights.items()}
    else:
        raise UserError(f"no weights in {path}: it has neither {WEIGHTS} nor {PICKLED}, nor an index of their shards")
    stored: dict[str, _InFile] = {}
    for name in names:
        try:
            file = safe_open(path / name, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{path / name} is damaged, copy it again: {error}") from error
        stored |= {key: _InFile(file, key) for key in file.keys()}  # noqa: SIM118 - it is not a dict
    return stored


def _shards_of(index: Path) -> list[str]:
    """Return the names of the files in an index; UserError if it is damaged or one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged, copy it again: {error!r}") from error
    for name in names:
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing: copy that shard too")
    return names


def _read(
    pieces: list[Piece],
    stored: Mapping[str, _InMemory | _InFile | _Mapped],
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Return one parameter, of ``shape``, assembled from its pieces."""
    if pieces[0].index == ():
        parameter = stored[pieces[0].name].read().to(device=device, dtype=dtype)
        return parameter if pieces[0].scale == 1 else parameter / pieces[0].scale
    parameter = torch.empty(shape, dtype=dtype, device=device)
    for name, index, _ in pieces:
        parameter[index].copy_(stored[name].read())
    return parameter


def _check_fit(path: Path, expected: dict[str, torch.Size], stored: dict[str, torch.Size]) -> None:
    """Raise UserError unless the stored tensors have the expected names and shapes."""
    problems = [f"{name} is missing" for name in expected if name not in stored]
    problems += [f"{name} is not part of this model" for name in stored if name not in expected]
    problems += [
        f"{name} has shape {tuple(stored[name])} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        others = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"the weights of {path} do not fit their configuration, take both from one model: "
            f"{'; '.join(problems[:3])}{others}"
        )
