"""Parameters that an adapter trains whole: ``modules_to_save`` and biases. Their old values are kept next to them.

Where two layers share one parameter (the embedding and the output layer) and only one of them is trained, it gets a
parameter of its own; ``untie`` does that, and the model's configuration says so from then on.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.config import LoRAConfig, ends_with


def whole_names(model: nn.Module, config: LoRAConfig, names: list[str]) -> set[str]:
    """Return the names of the parameters that ``config`` trains whole; nothing is changed.

    Raises:
        UserError: a name in ``modules_to_save`` that no layer has.
    """
    layers = {name: module for name, module in model.named_modules() if ".lora" not in name}
    chosen: set[str] = set()
    for wanted in config.modules_to_save:
        found = {name for name in layers if ends_with(name, wanted)}
        own = {f"{name}.{key}" for name in found for key, _ in layers[name].named_parameters(recurse=True)}
        own = {name for name in own if ".lora." not in name}
        if not own:
            have = sorted({name.rsplit(".", 1)[-1] for name, module in layers.items() if module._parameters})
            raise UserError(f"modules_to_save: no layer is called {wanted}: there are {', '.join(have)}")
        chosen |= own
    if config.bias != "none":
        biased = names if config.bias == "lora_only" else list(layers)
        chosen |= {f"{name}.bias" for name in biased if isinstance(layers[name]._parameters.get("bias"), nn.Parameter)}
    return chosen


def train_parameters(model: nn.Module, config: LoRAConfig, names: list[str]) -> dict[str, Tensor]:
    """Make the whole layers and biases of ``config`` trainable; return their values by name."""
    chosen = whole_names(model, config, names)
    untie(model, chosen)
    values: dict[str, Tensor] = {}
    base = model.lora_adapters.base
    wide: dict[int, nn.Parameter] = {}  # parameters that are one stay one
    for name, parameter in list(named_parameters(model)):
        if name in chosen:
            base.setdefault(name, parameter.detach().clone())
            values[name] = base[name].float() if _is_half(parameter) else base[name].clone()
            if _is_half(parameter):  # its updates would be lost
                owner, key = _owner(model, name)
                owner._parameters[key] = wide.setdefault(id(parameter), nn.Parameter(parameter.detach().float()))
    return values


def untie(model: nn.Module, chosen: set[str]) -> None:
    """Give parameters in ``chosen`` that are one with a parameter outside of it a copy of their own."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model):
        by_id.setdefault(id(parameter), []).append(name)
    for together in by_id.values():
        mine, others = [n for n in together if n in chosen], [n for n in together if n not in chosen]
        if not mine or not others:
            continue
        owner, key = _owner(model, others[0])
        copy = nn.Parameter(owner._parameters[key].detach().clone(), requires_grad=False)
        for name in mine:
            owner, key = _owner(model, name)
            owner._parameters[key] = copy
            model.lora_adapters.untied[name] = others[0]
        _say_tied(model, False)


def restore_parameters(model: nn.Module) -> None:
    """Give every whole parameter its old value back, and tie again what was tied."""
    fill_parameters(model, {})
    narrow_parameters(model)
    for name, other in model.lora_adapters.untied.items():
        owner, key = _owner(model, name)
        source, source_key = _owner(model, other)
        owner._parameters[key] = source._parameters[source_key]
        _say_tied(model, True)


def narrow_parameters(model: nn.Module) -> None:
    """Give whole parameters the dtype back that they had before they were trained."""
    narrow: dict[int, nn.Parameter] = {}
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        if parameter.dtype != old.dtype:
            owner._parameters[key] = narrow.setdefault(id(parameter), nn.Parameter(parameter.detach().to(old.dtype)))


@torch.no_grad()
def fill_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set every whole parameter to its value in ``values``, and train it; where it has none, to its old one."""
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        parameter.copy_(values.get(name, old))
        parameter.requires_grad_(name in values)


def read_parameters(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the present values of the whole parameters among ``names``."""
    base = model.lora_adapters.base
    found = {name: _owner(model, name) for name in names if name in base}
    return {name: owner._parameters[key].detach().clone() for name, (owner, key) in found.items()}


@contextlib.contextmanager
def base_values_shown(model: nn.Module) -> Iterator[None]:
    """Inside, whole parameters have their old values; nothing is copied."""
    held = []
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        held.append((parameter, parameter.data))
        parameter.data = old.to(parameter)
    try:
        yield
    finally:
        for parameter, trained in reversed(held):
            parameter.data = trained


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter under every name that it has, adapters left out."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora." not in name:
            yield name, parameter


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _say_tied(model: nn.Module, tied: bool) -> None:
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        model.config = dataclasses.replace(config, tie_word_embeddings=tied)
    elif config is not None:
        config.tie_word_embeddings = tied
