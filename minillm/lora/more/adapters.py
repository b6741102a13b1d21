"""Several adapters of one model: which of them is active, and with what weight.

Every adapted layer has one slot, its ``LoRA`` module, as wide as the largest adapter. The active adapter's numbers are
in the slots, where they are trained; the others are stored in ``model.lora_adapters``. Switching copies numbers into
the same tensors, so a compiled model is not compiled again, and a wrapper such as DDP sees the same parameters. Two
adapters at once are one whose ranks are concatenated: ``s₁ B₁ A₁ + s₂ B₂ A₂ = [s₁ B₁, s₂ B₂] [A₁; A₂]``.

Legend: R rank.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora import core
from minillm.lora.core import LoRA, adapted_layers, attach
from minillm.lora.more.config import LoRAConfig
from minillm.lora.more.experts import new_slot
from minillm.lora.more.init import RESIDUAL_INITS
from minillm.lora.more.layers import DoRA
from minillm.lora.more.whole import base_values, fill_parameters, read_parameters


@dataclass
class Adapter:
    """An adapter while it is not active: ``<layer>.A``, ``<layer>.B``, ``<layer>.magnitude``, whole parameters."""

    config: LoRAConfig
    names: list[str]
    tensors: dict[str, Tensor]


@dataclass
class Adapters:
    """All adapters of a model.

    Attributes:
        active: names and weights of the active ones; one name with weight 1 can be trained.
        base: values of the parameters that some adapter trains whole, as they were before.
        untied: names of parameters that were tied to another before, and the name of that.
    """

    stored: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)

    def check_new(self, name: str, config: LoRAConfig) -> None:
        """Raise UserError unless an adapter of this name and kind can be added to the present ones."""
        if not name or any(character in name for character in "./\\"):
            raise UserError(f"adapter_name {name!r}: give a name without dots and slashes")
        if name in self.stored:
            raise UserError(f"there is an adapter {name!r} already: choose another name; there are {self.known}")
        for other, adapter in self.stored.items():
            if adapter.config.use_dora != config.use_dora:
                raise UserError(f"{other!r} and {name!r} are not both DoRA: load them into two models")
            for residual, init in ((other, adapter.config.init), (name, config.init)):
                if init in RESIDUAL_INITS:
                    raise UserError(
                        f"{residual!r} subtracts its start from the model's weights ({init}), so no other adapter "
                        f"works on them: save it and load it again, then it is an adapter like any other"
                    )

    @property
    def known(self) -> str:
        """Return the names, for messages."""
        return ", ".join(self.stored) or "none"


def adapters_of(model: nn.Module) -> Adapters:
    """Return the adapters of ``model``; UserError when it has none."""
    adapters = getattr(model, "lora_adapters", None)
    if adapters is None:
        raise UserError("the model has no adapter: apply_lora or load_lora gives it one")
    return adapters


def ensure_slots(model: nn.Module, adapter: Adapter, *, ranks: Mapping[str, int] | None = None) -> None:
    """Give every layer of ``adapter`` a slot that is wide enough for it (for ``ranks`` by name, where given)."""
    layers = dict(model.named_modules())
    for name in adapter.names:
        layer, config = layers[name], adapter.config
        rank = (ranks or {}).get(name, config.rank_of(name))
        old = getattr(layer, "lora", None)
        if old is not None and len(old.A.weight) >= rank:
            continue
        slot = new_slot(layer, rank=rank, dropout=config.dropout, use_dora=config.use_dora)
        if old is not None:
            _fill(slot, old.A.weight, old.B.weight, old.scaling.item())
            slot.enabled = old.enabled
            if isinstance(slot, DoRA):
                slot.magnitude.data.copy_(old.magnitude)
        attach(layer, slot)


@torch.no_grad()
def _fill(slot: LoRA, a: Tensor, b: Tensor, scaling: float) -> None:
    """Copy an adapter of the slot's rank, or a lower one, into the slot; the rest becomes zero."""
    rank = len(a)
    slot.A.weight[:rank].copy_(a)
    slot.A.weight[rank:] = 0
    slot.B.weight[:, :rank].copy_(b)
    slot.B.weight[:, rank:] = 0
    slot.scaling.fill_(scaling)


def set_adapter(model: nn.Module, which: str | Mapping[str, float] | None) -> None:
    """Activate one adapter, or several with weights: ``set_adapter(model, {"cooking": 0.7, "medical": 0.3})``.

    A single one can be trained further; a mixture is for inference. The one that was active keeps what it has learnt.

    Raises:
        UserError: an unknown name; a mixture of DoRA, or of adapters with whole layers, which do not add up; the
            adapter is merged into the weights at the moment.
    """
    adapters = adapters_of(model)
    weights = {which: 1.0} if isinstance(which, str) else dict(which or {})
    unknown = [name for name in weights if name not in adapters.stored]
    if unknown or not weights:
        raise UserError(f"no adapter {', '.join(unknown) or which!r}: there are {adapters.known}")
    core.check_unmerged(model)
    single = list(weights.values()) == [1.0]
    mixed = [adapters.stored[name] for name in weights]
    for name, adapter in zip(weights, mixed, strict=True):
        if not single and adapter.config.use_dora:
            raise UserError(f"{name!r} is DoRA, whose row lengths do not add up: activate it alone, with weight 1")
        if not single and len(adapter.tensors) > 2 * len(adapter.names):
            raise UserError(f"{name!r} trains whole layers, which do not add up: activate it alone, with weight 1")
    store_active(model)
    if not single:
        for adapter in mixed:
            ranks = {n: sum(a.config.rank_of(n) for a in mixed if n in a.names) for n in adapter.names}
            ensure_slots(model, adapter, ranks=ranks)
    for name, layer in adapted_layers(model).items():
        parts = [
            (weight * adapter.config.scaling_of(name), adapter)
            for weight, adapter in zip(weights.values(), mixed, strict=True)
            if name in adapter.names
        ]
        slot = layer.lora
        if single and parts:
            ((scaling, adapter),) = parts
            _fill(slot, adapter.tensors[f"{name}.A"], adapter.tensors[f"{name}.B"], scaling)
            if isinstance(slot, DoRA):
                slot.magnitude.data.copy_(adapter.tensors[f"{name}.magnitude"])
        elif parts:
            a = torch.cat([adapter.tensors[f"{name}.A"].to(slot.scaling) for _, adapter in parts])
            b = torch.cat([s * adapter.tensors[f"{name}.B"].to(slot.scaling) for s, adapter in parts], dim=1)
            _fill(slot, a, b, 1.0)
        else:
            _fill(slot, slot.A.weight[:0], slot.B.weight[:, :0], 0.0)
            if isinstance(slot, DoRA):
                slot.magnitude.data.copy_(slot.row_norms(layer.weight))
        slot.dropout = max((adapter.config.dropout for _, adapter in parts), default=0.0)
        slot.requires_grad_(single and bool(parts))
    fill_parameters(model, mixed[0].tensors if single else {})
    adapters.active = weights
    model.lora_config = mixed[0].config


@torch.no_grad()
def store_active(model: nn.Module) -> None:
    """Copy what the active adapter has learnt into its stored form, from which it is saved."""
    adapters = adapters_of(model)
    if list(adapters.active.values()) != [1.0]:
        return  # none yet, or a mixture, which is not trained
    (name,) = adapters.active
    adapter, layers = adapters.stored[name], adapted_layers(model)
    if not all(layer.lora.enabled for layer in layers.values()):
        raise UserError("the adapter is disabled (disable_lora): leave that block first")
    for layer_name in adapter.names:
        slot, rank = layers[layer_name].lora, adapter.config.rank_of(layer_name)
        adapter.tensors[f"{layer_name}.A"] = slot.A.weight[:rank].detach().clone()
        adapter.tensors[f"{layer_name}.B"] = slot.B.weight[:, :rank].detach().clone()
        if isinstance(slot, DoRA):
            adapter.tensors[f"{layer_name}.magnitude"] = slot.magnitude.detach().clone()
    adapter.tensors |= read_parameters(model, adapter.tensors)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter that is not active; UserError for the active one or an unknown name."""
    adapters = adapters_of(model)
    if name not in adapters.stored:
        raise UserError(f"no adapter {name!r}: there are {adapters.known}")
    if name in adapters.active:
        raise UserError(f"adapter {name!r} is active: activate another one first, or remove_lora")
    del adapters.stored[name]


@contextlib.contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Inside ``with disable_lora(model):`` the model computes as before, whole layers and biases included."""
    adapters_of(model)
    with core.disable_lora(model), base_values(model):
        yield model
