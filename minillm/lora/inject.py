"""Put adapters into a model, and take them out again without a trace."""

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.adapters import (
    Adapter,
    Adapters,
    adapters_of,
    check_unmerged,
    make_room,
    set_adapter,
    trainable_names,
)
from minillm.lora.config import ALL_LINEAR, BLOCK, LoRAConfig, ends_with, matches
from minillm.lora.experts import ADAPTABLE, check_kinds
from minillm.lora.init import TAKEN_OUT, first_values
from minillm.lora.layer import adapted_layers, unbind
from minillm.lora.whole import restore_parameters, train_parameters, untie, whole_names


def apply_lora(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter_name: str = "default",
    generator: torch.Generator | None = None,
    **settings,
) -> list[str]:
    """Adapt ``model`` in place and freeze everything else; return the names of the adapted layers.

    Any module with ``nn.Linear`` or ``nn.Embedding`` in it can be adapted, transformers' models included. Settings are
    the fields of ``LoRAConfig``: ``rank=8, alpha=16, dropout=0.0, target_modules="all-linear", ...``.

    Args:
        generator: draws A (default: torch's own).

    Raises:
        UserError: the model has an adapter already; no layer matches (the message lists what there is); a setting
            that does not fit a layer.
    """
    if getattr(model, "lora_adapters", None) is not None:
        have = ", ".join(model.lora_adapters.stored)
        raise UserError(f"the model has an adapter already ({have}): add_adapter adds one, remove_lora removes all")
    config = dataclasses.replace(config or LoRAConfig(), **settings)
    names = find_targets(model, config)  # raises before anything is changed
    model.lora_adapters = Adapters(trainable=trainable_names(model))
    try:
        model.requires_grad_(False)
        add_adapter(model, adapter_name, config, names=names, generator=generator)
    except BaseException:  # memory may be short too
        remove_lora(model)
        raise
    return names


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: LoRAConfig | None = None,
    *,
    names: list[str] | None = None,
    generator: torch.Generator | None = None,
    **settings,
) -> None:
    """Add one more adapter to an adapted model, freshly drawn, and make it the active one.

    Make the optimizer afterwards: room for a larger rank means new parameters.
    """
    adapters = adapters_of(model)
    config = dataclasses.replace(config or LoRAConfig(), **settings)
    check_unmerged(model)
    adapters.check_new(adapter_name, config)
    names = find_targets(model, config) if names is None else names
    whole = whole_names(model, config, names)  # raises before anything is changed
    if config.bias != "none" and not any(name.endswith(".bias") for name in whole):
        what = "the model has no bias" if config.bias == "all" else "no adapted layer has a bias"
        raise UserError(f"bias={config.bias!r} (--lora_bias {config.bias}): {what}; leave it out")
    layers = dict(model.named_modules())
    check_kinds(layers, names, config)
    tensors: dict[str, Tensor] = {}
    for name in names:
        layer = layers[name]
        rank, scaling = config.rank_of(name), config.scaling_of(name)
        a, b = first_values(layer, rank=rank, scaling=scaling, init=config.init, generator=generator)
        tensors |= {f"{name}.A": a, f"{name}.B": b}
    adapter = Adapter(config=config, names=names, tensors=tensors)
    make_room(model, adapter)
    for name in names if config.init in TAKEN_OUT else ():
        untie(model, {f"{name}.weight"})  # what shares this weight keeps it whole
        take_out(layers[name], tensors[f"{name}.A"], tensors[f"{name}.B"], config.scaling_of(name))
    if config.use_dora:
        for name in names:
            delta = config.scaling_of(name) * tensors[f"{name}.B"] @ tensors[f"{name}.A"]
            tensors[f"{name}.magnitude"] = (layers[name].weight.to(delta) + delta).norm(dim=1)
    tensors |= train_parameters(model, config, names)
    adapters.stored[adapter_name] = adapter
    set_adapter(model, adapter_name)


@torch.no_grad()
def take_out(layer: nn.Module, a: Tensor, b: Tensor, scaling: float) -> None:
    """Subtract s·B A from the layer's weight; the adapter then begins with what is missing."""
    weight = layer.weight
    layer.lora.base_weight = weight.detach().to("cpu", copy=True)
    layer.lora.initial = (a.clone(), b.clone())
    weight.copy_(weight.to(a.dtype) - scaling * (b @ a))


def remove_lora(model: nn.Module) -> None:
    """Take all adapters out: weights, trainable parameters, state dict and forward are as before ``apply_lora``."""
    adapters = adapters_of(model)
    for layer in adapted_layers(model).values():
        if layer.lora.base_weight is not None:
            with torch.no_grad():
                layer.weight.copy_(layer.lora.base_weight)
        unbind(layer)
    restore_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters.trainable)
    del model.lora_adapters


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what is trained: A, B and magnitudes of the active adapter, and what it trains whole."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Return the names of the layers that ``config`` adapts, in the order of the model.

    Raises:
        UserError: none matches, or a name in ``target_modules`` or a pattern matches none; the message lists the
            layers there are.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ADAPTABLE)}
    layers = {name: module for name, module in layers.items() if ".lora." not in name}
    numbers = {int(match[1]) for match in map(BLOCK.search, layers) if match}
    if absent := [number for number in config.layers or () if number not in numbers]:
        have = f"0 to {max(numbers)}" if numbers else "none"
        raise UserError(f"layers {', '.join(map(str, absent))}: the model has no such block; its blocks are {have}")
    saved = tuple(name for name in layers if any(f".{whole}." in f".{name}." for whole in config.modules_to_save))
    found = []
    for name, module in layers.items():
        wanted = config.is_target(name)
        explicit = wanted is not None
        if not explicit:
            wanted = isinstance(module, nn.Linear) and not is_output_layer(model, name, module)
        if wanted and name not in saved:
            why = _bypassed(model, name, module)
            if not why:
                found.append(name)
            elif explicit:
                raise UserError(f"{name} {why}: an adapter there would not be seen; leave it out")
    known = (*found, *saved)
    targets = [target for target in config.target_names or () if target != ALL_LINEAR]
    missing = [target for target in targets if not any(ends_with(name, target) for name in known)]
    if missing or not found:
        kinds = sorted({re.sub(r".*\.(?!gate_up$|down$)", "", name) for name in layers})
        blocks = "" if config.layers is None else f" in the blocks {', '.join(map(str, config.layers))}"
        what = ", ".join(missing) or str(config.target_modules)
        raise UserError(f"no layer{blocks} is called {what}: there are {', '.join(kinds)}, and the words {ALL_LINEAR}, "
                        "attention, mlp, experts")  # fmt: skip
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        if not any(matches(pattern, name) for name in found):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in found})
            raise UserError(f"the pattern {pattern!r} matches no adapted layer: there are {', '.join(kinds)}")
    return found


def _bypassed(model: nn.Module, name: str, module: nn.Module) -> str:
    """Return why an adapter of a layer would not take part in what the model computes; empty: it would."""
    is_plain = type(module).forward is nn.Linear.forward and isinstance(module._parameters.get("weight"), nn.Parameter)
    if isinstance(module, nn.Linear) and not is_plain:
        return f"is a {type(module).__name__}, which computes in its own way"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"belongs to a {type(parent).__name__}, which reads its weight past its forward"
    return ""


def is_output_layer(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Return whether ``module`` makes the logits: ``lm_head``, or what a transformers model says it is."""
    said = getattr(model, "get_output_embeddings", lambda: None)()
    return module is said or ends_with(name, "lm_head")
