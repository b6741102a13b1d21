"""Adapters on disk: peft's directories, and one flat ``.pth``.

A directory has ``adapter_config.json`` and ``adapter_model.safetensors`` as peft writes them, so either opens what the
other saved. With them is ``base.json`` (``base.py``).
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.config.experts_on_disk import stored_scale
from minillm.errors import UserError
from minillm.files import atomic_file, replace_text, system_errors, use_umask
from minillm.lora import core
from minillm.lora.core import adapted_layers, ends_with
from minillm.lora.more.adapters import Adapter, Adapters, adapters_of, ensure_slots, set_adapter, store_active
from minillm.lora.more.apply import remove_lora
from minillm.lora.more.base import BASE, check_base, same_weights, sample_weights
from minillm.lora.more.config import LoRAConfig
from minillm.lora.more.experts import ADAPTABLE, EXPERT_PRODUCTS, check_layer_kinds, factor_shapes
from minillm.lora.more.layers import ResidualLoRA
from minillm.lora.more.whole import named_parameters, train_parameters, untie, whole_names
from minillm.model.moe import ExpertProduct

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Our name of a tensor of a layer, and peft's; embeddings have names of their own.
KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
EMBEDDING_KEYS = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_FLAT = re.compile(r"(.+)\.lora\.(?:(A|B)\.weight|(magnitude))")
_EXPERTS = re.compile(r"(.+\.experts)((?:\.base_layer)*)")
_PEFT = re.compile(r"(.+)\.(?:" + "|".join(map(re.escape, [*KEYS.values(), *EMBEDDING_KEYS.values()])) + ")")


def save_lora(model: nn.Module, path: str | Path, *, adapter_name: str | None = None) -> None:
    """Write one adapter: a directory as peft's, or with ``.pth`` at the end of ``path`` one flat file.

    The flat file has ``<layer>.lora.A.weight``, ``<layer>.lora.B.weight`` and ``lora_config``. PiSSA and OLoRA, which
    subtracted their start from the weights, are saved as the difference to it, of twice the rank: an adapter that fits
    the original model. Each file is written atomically.

    Args:
        adapter_name: default: the active one.

    Raises:
        UserError: no such adapter, or a mixture is active; it is not finite; ``path`` cannot be written.
    """
    adapters = adapters_of(model)
    store_active(model)
    if adapter_name is None:
        if list(adapters.active.values()) != [1.0]:
            raise UserError(f"several adapters are active ({', '.join(adapters.active)}): choose one (adapter_name)")
        (adapter_name,) = adapters.active
    if adapter_name not in adapters.stored:
        raise UserError(f"no adapter {adapter_name!r}: there are {adapters.known}")
    adapter = as_difference(adapters.stored[adapter_name], model)
    tensors = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in adapter.tensors.items()}
    path = Path(path)
    _check_finite(tensors, "the adapter", "nothing was written; go back to a checkpoint before it")
    for name in tensors:
        tensors[name] = tensors[name] * _stored_scale(model, name)
    try:
        if path.suffix == ".pth":
            path.parent.mkdir(parents=True, exist_ok=True)
            flat: dict[str, Any] = {_flat_name(name, adapter.names): tensor for name, tensor in tensors.items()}
            settings = dataclasses.asdict(adapter.config).items()
            flat["lora_config"] = {key: list(value) if isinstance(value, tuple) else value for key, value in settings}
            with atomic_file(path) as temporary, system_errors(), temporary.open("wb") as file:
                torch.save(flat, file)
            return
        path.mkdir(parents=True, exist_ok=True)
        layers = dict(model.named_modules())
        stored = dict(_to_peft(name, tensor, adapter.names, layers) for name, tensor in tensors.items())
        with atomic_file(path / WEIGHTS) as temporary:
            with system_errors():
                save_file(stored, temporary, metadata={"format": "pt"})
            use_umask(temporary)
        base = getattr(getattr(model, "config", None), "name_or_path", None) or getattr(model, "origin", None)
        if base and Path(base).exists():  # an absolute path, valid in any working directory
            base = Path(base).resolve()
        whole = [n for n in layers if any(ends_with(n, name) for name in adapter.config.modules_to_save)]
        whole = [name for name in whole if ".lora" not in name]  # full names: peft takes any name with such an end
        config = adapter.config.to_peft(names=adapter.names, whole=whole, base=base and str(base))
        _write_json(path / CONFIG, config)
        _write_json(path / BASE, {"base": base and str(base), "sample": sample_weights(model, adapter.names)})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the adapter to {path}: {reason}; choose another path") from None


def load_lora(
    model: nn.Module,
    path: str | Path,
    *,
    adapter_name: str = "default",
    any_base: bool = False,
) -> None:
    """Read an adapter, a directory of ours or peft's or a flat ``.pth``, and activate it.

    The model may have adapters already; then this is one more.

    Args:
        any_base: take it even if it was made for another model of the same shapes.

    Raises:
        UserError: nothing to read there; damaged, or with code in it; not LoRA, or with settings not supported here;
            layers that the model does not have, or of other shapes; made for another model; not finite.
    """
    path = Path(path)
    adapter = read_fitting_adapter(model, path, any_base=any_base)
    config, names, tensors = adapter.config, adapter.names, adapter.tensors
    whole = whole_names(model, config, names)
    is_first = getattr(model, "lora_adapters", None) is None
    if is_first:
        model.lora_adapters = Adapters()
        core.freeze(model, config)
    adapters = adapters_of(model)
    try:
        core.check_unmerged(model)
        adapters.check_new(adapter_name, config)
        _drop_base_weights(model, tensors, _own_names(adapter) | whole, path)
        ensure_slots(model, adapter)
        _untie_different(model, {name: tensors[name] for name in whole})
        train_parameters(model, config, names)
    except BaseException:  # also where memory is short
        if is_first:
            remove_lora(model)
        raise
    adapters.stored[adapter_name] = adapter
    set_adapter(model, adapter_name)


def read_fitting_adapter(model: nn.Module, path: Path, *, any_base: bool = False) -> Adapter:
    """Return an adapter on disk that fits ``model``, which stays as it is; errors as in ``load_lora``."""
    config, tensors = read_adapter(path)
    _check_finite(tensors, f"the adapter {path}", "take one from a checkpoint before it")
    tensors = {name: tensor / _stored_scale(model, name) for name, tensor in tensors.items()}
    names = sorted({name.rpartition(".")[0] for name in tensors if name.endswith((".A", ".B", ".magnitude"))})
    adapter = Adapter(config=config, names=names, tensors=tensors)
    _check_fit(model, adapter, path)
    try:
        check_layer_kinds(dict(model.named_modules()), names, config)
        whole = whole_names(model, config, names)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if missing := whole - set(tensors):
        raise UserError(f"{path} lacks {', '.join(sorted(missing)[:3])}, which its configuration says it trains")
    if not any_base and path.is_dir():
        check_base(model, path, names)
    return adapter


def as_difference(adapter: Adapter, model: nn.Module) -> Adapter:
    """Return ``adapter`` as one for the original model: s·(B A - B₀ A₀) = s·[B, -B₀] [A; A₀] after PiSSA or OLoRA."""
    config, layers = adapter.config, adapted_layers(model)
    if not all(isinstance(layers[name].lora, ResidualLoRA) for name in adapter.names):
        return adapter
    tensors = dict(adapter.tensors)
    for name in adapter.names:
        a, b = layers[name].lora.initial
        tensors[f"{name}.A"] = torch.cat([tensors[f"{name}.A"], a])
        tensors[f"{name}.B"] = torch.cat([tensors[f"{name}.B"], -b], dim=1)
    factor = 2**0.5 if config.use_rslora else 2  # so that s stays what it was
    config = dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        init="kaiming",
    )
    return Adapter(config=config, names=adapter.names, tensors=tensors)


# ---- reading -----------------------------------------------------------------------------------------------------


def read_adapter(path: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return the settings and tensors of an adapter on disk, ``<layer>.A`` and so on; errors as in ``load_lora``."""
    return _read_flat(path) if path.suffix == ".pth" else _read_directory(path)


def _read_directory(path: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    if not (path / CONFIG).is_file():
        raise UserError(f"no adapter at {path}: there is no {CONFIG}; give a directory that save_lora or peft wrote")
    try:
        config = LoRAConfig.from_peft(json.loads((path / CONFIG).read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"{path / CONFIG}: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG} is damaged, copy it again: {error}") from None
    if not (path / WEIGHTS).is_file():
        raise UserError(f"{path} has no {WEIGHTS}: copy that file too")
    try:
        stored = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{path / WEIGHTS} is damaged, copy it again: {error}") from None
    ours = {peft: key for table in (KEYS, EMBEDDING_KEYS) for key, peft in table.items()}
    tensors = {}
    for name, tensor in stored.items():
        name = name.removeprefix(PREFIX)
        if match := _PEFT.fullmatch(name):
            layer, key = match[1], ours[name[len(match[1]) + 1 :]]
            if experts := _EXPERTS.fullmatch(layer):
                layer = _expert_layer(experts[1], experts[2] or "", config)
                tensor = _from_wide(tensor, key, config.rank_of(layer))
            name = f"{layer}.{key}"
        tensors[name.replace(".base_layer.", ".")] = tensor
    return _with_full_names(config, tensors), tensors


def _with_full_names(config: LoRAConfig, tensors: Mapping[str, Tensor]) -> LoRAConfig:
    """Return ``config`` with full names in ``modules_to_save``: to peft, ``norm`` is an ``input_layernorm`` too."""
    parts = [name.split(".")[:-1] for name in tensors if name.rpartition(".")[2] not in KEYS]
    modules = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
    full = {end: [module for module in modules if module.endswith(end)] or [end] for end in config.modules_to_save}
    return dataclasses.replace(config, modules_to_save=tuple(name for names in full.values() for name in names))


def _read_flat(path: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    if not path.is_file():
        raise UserError(f"no adapter at {path}: there is no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything; with weights_only no code in it is run
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not an adapter: damaged, or with code in it, which is not run ({reason})") from None
    if not isinstance(stored, dict):
        raise UserError(f"{path} holds a {type(stored).__name__}, not an adapter")
    settings = stored.pop("lora_config", None)
    tensors = {}
    for name, tensor in stored.items():
        match = _FLAT.fullmatch(str(name))
        tensors[f"{match[1]}.{match[2] or match[3]}" if match else str(name)] = tensor
    if not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors.values()):
        raise UserError(f"{path} is not an adapter: it holds something other than tensors")
    ranks = {name.removesuffix(".A"): len(tensor) for name, tensor in tensors.items() if name.endswith(".A")}
    if not ranks:
        raise UserError(f"{path} is not an adapter: it has no <layer>.lora.A.weight; a model is given to --from_weight")
    if settings is None:  # then the scaling is 1
        patterns = {re.escape(name): rank for name, rank in ranks.items()}
        settings = {"rank": max(ranks.values()), "alpha": max(ranks.values()), "target_modules": tuple(ranks)}
        settings |= {"rank_pattern": patterns, "alpha_pattern": dict(patterns)}
    try:
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return LoRAConfig(**settings), tensors
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path}: its lora_config has settings that do not exist here: {error}") from None


def _check_fit(model: nn.Module, adapter: Adapter, path: Path) -> None:
    """Raise UserError unless every tensor of the adapter fits the model; the first three that do not are named."""
    layers, problems = dict(model.named_modules()), []
    parameters = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for name in adapter.names:
        layer = layers.get(name)
        if not isinstance(layer, ADAPTABLE):
            problems.append(f"{name}: the model has no such layer")
            continue
        shapes = factor_shapes(layer, adapter.config.rank_of(name), use_dora=adapter.config.use_dora)
        for key, shape in shapes.items():
            tensor = adapter.tensors.get(f"{name}.{key}")
            if tensor is None:
                problems.append(f"{name}.{key} is missing")
            elif tuple(tensor.shape) != shape:
                problems.append(f"{name}.{key} has shape {tuple(tensor.shape)} and the model needs {shape}")
    for name in adapter.tensors.keys() - _own_names(adapter):
        if name not in parameters:
            problems.append(f"{name}: the model has no such parameter")
        elif adapter.tensors[name].shape != parameters[name]:
            shapes_of = f"{tuple(adapter.tensors[name].shape)} and the model needs {tuple(parameters[name])}"
            problems.append(f"{name} has shape {shapes_of}")
    if not adapter.names:
        problems.append("there are no A and B in it")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"the adapter {path} does not fit this model: {'; '.join(problems[:3])}{more}")


def _check_finite(tensors: Mapping[str, Tensor], what: str, fix: str) -> None:
    """Raise UserError naming the first tensor with a number that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{what} has numbers that are not finite in {name}: {fix}")


def _stored_scale(model: nn.Module, name: str) -> float:
    """Return which multiple of a tensor of an adapter is stored: that of its layer's weight, if it grows with that."""
    layer, _, key = name.rpartition(".")
    return stored_scale(layer, getattr(model, "config", None)) if key in ("B", "magnitude", "weight") else 1.0


def _own_names(adapter: Adapter) -> set[str]:
    return {f"{name}.{key}" for name in adapter.names for key in ("A", "B", "magnitude")}


def _drop_base_weights(model: nn.Module, tensors: dict[str, Tensor], own: set[str], path: Path) -> None:
    """Remove weights of the model itself from ``tensors``, which peft saves with the adapter of an embedding."""
    for name in tensors.keys() - own:
        ours, stored = model.lora_adapters.base.get(name), tensors.pop(name)
        ours = model.get_parameter(name).detach() if ours is None else ours
        if not same_weights(ours.float().cpu(), stored.float()):
            raise UserError(
                f"{path} brings a {name} of its own, which differs from this model's, and its settings do not say that "
                f"it trains it: load the model that it was made for"
            )


def _untie_different(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Untie parameters that are tied here and have different values in the file (peft trains tied layers apart)."""
    first_names: dict[int, str] = {}
    for name, parameter in named_parameters(model):
        if name in values:
            first = first_names.setdefault(id(parameter), name)
            if not torch.equal(values[name], values[first]):
                untie(model, {name})


# ---- writing -----------------------------------------------------------------------------------------------------


def _flat_name(name: str, names: list[str]) -> str:
    layer, _, key = name.rpartition(".")
    if layer not in names or key not in KEYS:
        return name
    return f"{layer}.lora.{key}" + ("" if key == "magnitude" else ".weight")


def _to_peft(name: str, tensor: Tensor, names: list[str], layers: Mapping[str, nn.Module]) -> tuple[str, Tensor]:
    """Return peft's name of a tensor and its form there."""
    layer, _, key = name.rpartition(".")
    if layer not in names:
        return PREFIX + name, tensor
    if key not in KEYS:  # a bias that is trained whole
        return f"{PREFIX}{layer}.base_layer.{key}", tensor
    if isinstance(layers[layer], ExpertProduct):
        home = layer.rpartition(".")[0]
        nested = [product for product in EXPERT_PRODUCTS if f"{home}.{product}" in names]
        depth = len(nested) - 1 - nested.index(layer.rpartition(".")[2])
        wide = tensor.transpose(0, 1).flatten(0, 1) if key == "A" else tensor.flatten(1)
        return f"{PREFIX}{home}{'.base_layer' * depth}.{KEYS[key]}", wide.contiguous()
    keys = EMBEDDING_KEYS if isinstance(layers[layer], nn.Embedding) else KEYS
    return f"{PREFIX}{layer}.{keys[key]}", tensor


# peft wraps the module that holds fused parameters once for each of them, in this order: the last is outermost.
def _expert_layer(home: str, inner: str, config: LoRAConfig) -> str:
    nested = [product for product in EXPERT_PRODUCTS if config.is_target(f"{home}.{product}")]
    depth = inner.count("base_layer")
    return f"{home}.{nested[len(nested) - 1 - depth]}" if depth < len(nested) else f"{home}.lora_A at depth {depth}"


def _from_wide(tensor: Tensor, key: str, rank: int) -> Tensor:
    """Return A (R, E, in) of (E·R, in), or B (out, R, E) of (out, R·E)."""
    if tensor.shape[0 if key == "A" else 1] % rank:
        return tensor  # the check of shapes refuses it
    if key == "A":
        return tensor.unflatten(0, (-1, rank)).transpose(0, 1).contiguous()
    return tensor.unflatten(1, (rank, -1))


def _write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    replace_text(path, text)
