"""Add an adapter to the weights for good, or for a while."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora.adapters import adapters_of, set_adapter, write_slots
from minillm.lora.files import load_lora
from minillm.lora.inject import remove_lora
from minillm.lora.layer import adapted_layers
from minillm.lora.whole import narrow_parameters, untie


@torch.no_grad()
def merge_lora(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """Add the active adapters to the weights: ``W + s·B A``; the forward pass then costs nothing extra.

    Args:
        keep_base: keep the adapter, and the old weights on the CPU, so that ``unmerge_lora`` gives them back bit for
            bit. False: the adapter is gone afterwards, and ``model`` is an ordinary model, to be saved or served.

    Raises:
        UserError: it is merged already; a sum is not finite in the weight's dtype (the model stays as it was).
    """
    adapters = adapters_of(model)
    layers = adapted_layers(model)
    if any(layer.lora.merged for layer in layers.values()):
        raise UserError("the adapter is merged already")
    write_slots(model)
    for name, layer in layers.items():
        untie(model, {f"{name}.weight"})  # an embedding and an output layer with one weight: this change is one's own
        lora, weight = layer.lora, layer.weight
        merged = (weight.to(lora.scaling) + lora.delta(layer)).to(weight.dtype)
        if not merged.isfinite().all():
            for before in layers.values():
                if before.lora.merged:
                    _unmerge(before)
            short = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}.weight with the adapter has numbers that are not finite in {short}: nothing was merged; the "
                f"adapter is broken, or too large for {short}"
            )
        if lora.base_weight is None:
            lora.base_weight = weight.detach().to("cpu", copy=True)
        weight.copy_(merged)
        lora.merged = True
    if keep_base:
        return model
    for layer in layers.values():
        layer.lora.base_weight = None  # so that nothing is put back
    narrow_parameters(model)
    adapters.base.clear()
    adapters.untied.clear()
    remove_lora(model)
    return model


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> nn.Module:
    """Give the layers the weights back that they had before ``merge_lora``, bit for bit."""
    layers = adapted_layers(model).values()
    adapters_of(model)
    if not all(layer.lora.merged for layer in layers):
        raise UserError("the adapter is not merged: merge_lora merges it")
    for layer in layers:
        _unmerge(layer)
    return model


@torch.no_grad()
def _unmerge(layer: nn.Module) -> None:
    lora = layer.lora
    layer.weight.copy_(lora.base_weight)
    if lora.initial is None:
        lora.base_weight = None
    else:  # what stood there was the weight without what PiSSA or OLoRA begin with
        a, b = lora.initial
        layer.weight.copy_(layer.weight.to(a.dtype) - lora.scaling * (b @ a))
    lora.merged = False


def merge_adapters(model: nn.Module, chosen: Sequence[tuple[Path, float]], *, any_base: bool = False) -> None:
    """Add the adapters at these places, each with its weight, to the weights of ``model`` for good.

    Raises:
        UserError: none is named, or one twice; a weight that is not a number; whatever ``load_lora`` and
            ``set_adapter`` refuse.
    """
    if not chosen:
        raise UserError("no adapter is named: give at least one")
    if len({path.resolve() for path, _ in chosen}) < len(chosen):
        raise UserError("an adapter is named twice: name it once, with the sum of its weights")
    weights = {}
    for number, (path, weight) in enumerate(chosen, 1):
        if not math.isfinite(weight):
            raise UserError(f"the adapter {path} has the weight {weight}: give a number, e.g. 0.7")
        label = f"{path.name.replace('.', '_')}, number {number}"
        load_lora(model, path, adapter_name=label, any_base=any_base)
        weights[label] = weight
    set_adapter(model, weights)
    merge_lora(model, keep_base=False)
