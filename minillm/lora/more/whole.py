"""Parameters that an adapter trains whole: ``modules_to_save`` and biases. Their old values are kept.

Where two layers share one parameter (the embedding and the output layer) and only one of them is trained, it gets a
parameter of its own; ``untie`` does that, and sets ``tie_word_embeddings`` of the model's configuration.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.core import ends_with
from minillm.lora.more.config import LoRAConfig


def whole_names(model: nn.Module, config: LoRAConfig, names: list[str]) -> set[str]:
    """Return the names of the parameters that ``config`` trains whole; nothing is changed.

    Raises:
        UserError: a name in ``modules_to_save`` that no layer has.
    """
    layers = {name: module for name, module in model.named_modules() if ".lora" not in name}
    chosen: set[str] = set()
    for end in config.modules_to_save:
        modules = {name for name in layers if ends_with(name, end)}
        parameters = {f"{name}.{key}" for name in modules for key, _ in layers[name].named_parameters(recurse=True)}
        parameters = {name for name in parameters if ".lora." not in name}
        if not parameters:
            kinds = sorted({name.rsplit(".", 1)[-1] for name, module in layers.items() if module._parameters})
            raise UserError(f"modules_to_save: no layer is called {end}: there are {', '.join(kinds)}")
        chosen |= parameters
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
    wide: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for name, parameter in list(named_parameters(model)):
        if name in chosen:
            base.setdefault(name, parameter.detach().clone())
            values[name] = base[name].float() if _is_half(parameter) else base[name].clone()
            if _is_half(parameter):  # its updates would be lost
                owner, key = _owner(model, name)
                owner._parameters[key] = wide.setdefault(id(parameter), nn.Parameter(parameter.detach().float()))
    return values


def untie(model: nn.Module, chosen: set[str]) -> None:
    """Give parameters in ``chosen`` that are tied to a parameter outside of it a copy of their own."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in named_parameters(model):
        by_id.setdefault(id(parameter), []).append(name)
    for tied in by_id.values():
        inside, outside = [name for name in tied if name in chosen], [name for name in tied if name not in chosen]
        if not inside or not outside:
            continue
        owner, key = _owner(model, outside[0])
        copy = nn.Parameter(owner._parameters[key].detach().clone(), requires_grad=False)
        for name in inside:
            owner, key = _owner(model, name)
            owner._parameters[key] = copy
            model.lora_adapters.untied[name] = outside[0]
        _set_tie_word_embeddings(model, False)


def restore_parameters(model: nn.Module) -> None:
    """Restore the old value of every whole parameter, and tie again what was tied."""
    fill_parameters(model, {})
    narrow_parameters(model)
    for name, other in model.lora_adapters.untied.items():
        owner, key = _owner(model, name)
        source, source_key = _owner(model, other)
        owner._parameters[key] = source._parameters[source_key]
        _set_tie_word_embeddings(model, True)


def narrow_parameters(model: nn.Module) -> None:
    """Restore the dtype that whole parameters had before they were trained."""
    narrow: dict[int, nn.Parameter] = {}
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        if parameter.dtype != old.dtype:
            owner._parameters[key] = narrow.setdefault(id(parameter), nn.Parameter(parameter.detach().to(old.dtype)))


@torch.no_grad()
def fill_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set every whole parameter to its value in ``values`` and train it; without one, to its old value."""
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        parameter.copy_(values.get(name, old))
        parameter.requires_grad_(name in values)


def read_parameters(model: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the present values of the whole parameters among ``names``."""
    owners = {name: _owner(model, name) for name in names if name in model.lora_adapters.base}
    return {name: owner._parameters[key].detach().clone() for name, (owner, key) in owners.items()}


@contextlib.contextmanager
def base_values(model: nn.Module) -> Iterator[None]:
    """Give whole parameters their old values inside the block; nothing is copied."""
    trained_data = []
    for name, old in model.lora_adapters.base.items():
        owner, key = _owner(model, name)
        parameter = owner._parameters[key]
        trained_data.append((parameter, parameter.data))
        parameter.data = old.to(parameter)
    try:
        yield
    finally:
        for parameter, trained in reversed(trained_data):
            parameter.data = trained


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter with every name that it has, without those of adapters."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora." not in name:
            yield name, parameter


def _is_half(parameter: Tensor) -> bool:
    return parameter.dtype in (torch.float16, torch.bfloat16)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _set_tie_word_embeddings(model: nn.Module, tied: bool) -> None:
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        model.config = dataclasses.replace(config, tie_word_embeddings=tied)
    elif config is not None:
        config.tie_word_embeddings = tied
