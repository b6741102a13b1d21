"""Put adapters into a model, and remove them without a trace."""

import dataclasses

import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora import core
from minillm.lora.core import adapted_layers
from minillm.lora.more.adapters import Adapter, Adapters, adapters_of, ensure_slots, set_adapter
from minillm.lora.more.config import LoRAConfig
from minillm.lora.more.experts import check_layer_kinds
from minillm.lora.more.layers import DoRA, ResidualLoRA
from minillm.lora.more.whole import restore_parameters, train_parameters, untie, whole_names


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
        UserError: the model has an adapter already; no layer matches (the message lists the names of layers); a
            setting that does not fit a layer.
    """
    if getattr(model, "lora_adapters", None) is not None:
        names = model.lora_adapters.known
        raise UserError(f"the model has an adapter already ({names}): add_adapter adds one, remove_lora removes all")
    config = dataclasses.replace(config or LoRAConfig(), **settings)
    check_request(model, Adapters(), adapter_name, config)  # raises before anything is changed
    core.apply_lora(model, config, generator=generator)
    model.lora_adapters = Adapters()
    layers = adapted_layers(model)
    try:
        _store(model, adapter_name, config, {name: layer.lora for name, layer in layers.items()})
    except BaseException:  # also where memory is short
        remove_lora(model)
        raise
    return list(layers)


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: LoRAConfig | None = None,
    *,
    generator: torch.Generator | None = None,
    **settings,
) -> None:
    """Add one more adapter to an adapted model, newly initialized, and make it the active one.

    Make the optimizer afterwards: room for a larger rank means new parameters.
    """
    adapters = adapters_of(model)
    config = dataclasses.replace(config or LoRAConfig(), **settings)
    core.check_unmerged(model)
    names = check_request(model, adapters, adapter_name, config)
    loras = {name: config.new_lora(name, model.get_submodule(name), generator) for name in names}
    _store(model, adapter_name, config, loras)


def check_request(model: nn.Module, adapters: Adapters, adapter_name: str, config: LoRAConfig) -> list[str]:
    """Return the names of the layers to adapt; UserError where the adapter is not possible here."""
    adapters.check_new(adapter_name, config)
    names = config.find_targets(model)
    whole = whole_names(model, config, names)
    if config.bias != "none" and not any(name.endswith(".bias") for name in whole):
        reason = "the model has no bias" if config.bias == "all" else "no adapted layer has a bias"
        raise UserError(f"bias={config.bias!r} (--lora_bias {config.bias}): {reason}; leave it out")
    check_layer_kinds(dict(model.named_modules()), names, config)
    return names


def _store(model: nn.Module, adapter_name: str, config: LoRAConfig, loras: dict[str, core.LoRA]) -> None:
    """Make the new adapter ``loras``, by layer, one of the model's adapters, and activate it."""
    tensors = {}
    for name, lora in loras.items():
        tensors |= {f"{name}.A": lora.A.weight.detach().clone(), f"{name}.B": lora.B.weight.detach().clone()}
        if isinstance(lora, DoRA):
            tensors[f"{name}.magnitude"] = lora.magnitude.detach().clone()
        if isinstance(lora, ResidualLoRA):
            untie(model, {f"{name}.weight"})  # other layers with this weight keep all of it
            lora.subtract_initial(model.get_submodule(name), tensors[f"{name}.A"], tensors[f"{name}.B"])
    adapter = Adapter(config=config, names=list(loras), tensors=tensors)
    ensure_slots(model, adapter)
    adapter.tensors |= train_parameters(model, config, adapter.names)
    model.lora_adapters.stored[adapter_name] = adapter
    set_adapter(model, adapter_name)


def remove_lora(model: nn.Module) -> None:
    """Remove all adapters: weights, trainable parameters, state dict and forward are as before ``apply_lora``."""
    adapters_of(model)
    restore_parameters(model)
    core.remove_lora(model)
    del model.lora_adapters
