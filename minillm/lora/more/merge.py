"""Merge an adapter into the weights, with tied and whole layers; merge several adapters by their paths."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from minillm.errors import UserError
from minillm.lora import core
from minillm.lora.core import adapted_layers
from minillm.lora.more.adapters import adapters_of, set_adapter, store_active
from minillm.lora.more.apply import remove_lora
from minillm.lora.more.files import load_lora
from minillm.lora.more.whole import narrow_parameters, untie


def merge_lora(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """Add the active adapters to the weights: ``W + s·B A``; the forward pass then costs nothing extra.

    Args:
        keep_base: keep the adapter, and the old weights on the CPU, so that ``unmerge_lora`` restores them bit for
            bit. False: the adapter is gone afterwards, and ``model`` is an ordinary model, to be saved or served.

    Raises:
        UserError: it is merged already; a sum is not finite in the weight's dtype (the model stays as it was).
    """
    adapters = adapters_of(model)
    core.check_unmerged(model)
    store_active(model)
    layers = adapted_layers(model)
    for name in layers:
        untie(model, {f"{name}.weight"})  # an embedding and an output layer with one weight: only this one changes
    core.merge_lora(model)
    for name, layer in layers.items():
        if not layer.weight.isfinite().all():
            core.unmerge_lora(model)
            dtype = str(layer.weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{name}.weight with the adapter has numbers that are not finite in {dtype}: nothing was merged; the "
                f"adapter is broken, or too large for {dtype}"
            )
    if not keep_base:
        for layer in layers.values():
            layer.lora.base_weight = None  # so that remove_lora leaves the sums
        narrow_parameters(model)
        adapters.base.clear()
        adapters.untied.clear()
        remove_lora(model)
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Give the layers the weights back that they had before ``merge_lora``, bit for bit."""
    adapters_of(model)
    return core.unmerge_lora(model)


def merge_adapters(model: nn.Module, chosen: Sequence[tuple[Path, float]], *, any_base: bool = False) -> None:
    """Merge the adapters at these paths, each with its weight, into ``model`` and remove them.

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
