"""LoRA: fine-tune a model by training a few percent of new parameters, while its own parameters stay frozen.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1. Fine-tuning changes a weight
W (out, in) by ΔW. LoRA freezes W and writes ΔW as a product of two thin matrices; only these two are trained:

    y = W x + s · B A x        A (R, in), B (out, R), s = alpha/R

With R = 8 and in = out = 4096, A and B have 0.4 % as many numbers as W, and so have their gradients and AdamW's
moments. A starts random and B at zero, so B A = 0 and the model starts unchanged. After training, W + s · B A is one
matrix again: inference costs nothing extra.

    apply_lora(model, rank=8, alpha=16)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4)
    ...                                # train as usual
    save_lora(model, "cooking.pth")    # A and B alone
    merge_lora(model)                  # W + s · B A; unmerge_lora restores W bit for bit

This file does all of that, for any model with ``nn.Linear`` layers, and needs only ``minillm.errors``. ``more/``
adds the rest: DoRA, PiSSA, several adapters, embeddings, experts, peft's files. A variant is a subclass of ``LoRA``
with its own ``forward`` and ``delta``, and a subclass of ``LoRAConfig`` makes it (``new_lora``). The functions of
``more/`` call those of the same name here; ``minillm.lora`` exports them.

Legend: R rank.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import UserError

ALL_LINEAR = "all-linear"


# ---- one adapted layer -------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A and B of one linear layer; zeros until ``initialize``.

    They are at least float32 whatever the layer's dtype: updates of 1e-5 of a weight are lost in half precision.

    Attributes:
        scaling: s; a tensor, so that a compiled model is not compiled again for another value.
        enabled: False inside ``disable_lora``. merged: True while the layer's weight is W + s·B A.
        base_weight: a copy of W on the CPU while the layer's weight holds something else, otherwise None.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, dropout: float = 0.0, like: Tensor):
        super().__init__()
        options = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
        self.A = nn.utils.skip_init(nn.Linear, in_features, rank, bias=False, **options)  # draws no random numbers
        self.B = nn.utils.skip_init(nn.Linear, rank, out_features, bias=False, **options)
        nn.init.zeros_(self.A.weight)
        nn.init.zeros_(self.B.weight)
        self.register_buffer("scaling", torch.ones((), **options), persistent=False)  # ``new_lora`` sets alpha/rank
        self.dropout = dropout
        self.enabled, self.merged = True, False
        self.base_weight: Tensor | None = None

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw A uniformly, as torch draws the weight of a linear layer; B stays zero."""
        bound = 1 / math.sqrt(self.A.weight.shape[-1])
        nn.init.uniform_(self.A.weight, -bound, bound, generator=generator)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)  # (..., out)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.A.weight.to(x.dtype))  # (..., R)
        change = F.linear(low, self.B.weight.to(x.dtype))  # (..., out)
        return y + (self.scaling * change.to(self.scaling.dtype)).to(y.dtype)

    def base_forward(self, layer: nn.Module, *args) -> Tensor:
        """Compute the layer by itself, while the adapter is disabled or merged."""
        return type(layer).forward(layer, *args)

    def delta(self, layer: nn.Module) -> Tensor:
        """Return what the adapter adds to the layer's weight: s·B A (out, in)."""
        return self.scaling * (self.B.weight @ self.A.weight)

    def unmerge(self, layer: nn.Module) -> None:
        """Give the layer the weight back that it had before the merge."""
        layer.weight.copy_(self.base_weight)
        self.base_weight, self.merged = None, False


def adapted_forward(layer: nn.Module, *args) -> Tensor:
    """Compute an adapted layer."""
    lora = layer.lora
    return lora(layer, *args) if lora.enabled and not lora.merged else lora.base_forward(layer, *args)


def attach(layer: nn.Module, lora: LoRA) -> None:
    """Give a layer its adapter. The layer keeps its class and its weight; only its ``forward`` is replaced.

    ``functools.partial`` holds the layer as data, so ``copy.deepcopy`` and ``pickle`` bind the copy to itself. A
    closure would not: written in a loop it sees the last layer only, and a copy of it still computes with the original.
    """
    layer.lora = lora.train(layer.training)
    layer.forward = functools.partial(adapted_forward, layer)


def detach(layer: nn.Module) -> None:
    """Remove the adapter of a layer; the ``forward`` of its class is back."""
    del layer.lora, layer.forward


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if "lora" in module._modules}


# ---- the settings, and which layers they mean --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The settings of an adapter."""

    rank: int = 8
    """R, the width of the thin matrices."""
    alpha: float = 16.0
    """The product is scaled by s = alpha/rank."""
    dropout: float = 0.0
    """Probability that an input of A is set to zero in training."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """all-linear (all but the output layer), or ends of layer names, as a tuple or with commas: q_proj,v_proj."""

    words: ClassVar[tuple[str, ...]] = (ALL_LINEAR,)  # allowed in target_modules instead of names

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"rank is {self.rank!r}: give a whole number of at least 1")
        is_number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if not is_number or not 0 < self.alpha <= sys.float_info.max:
            raise UserError(f"alpha is {self.alpha!r}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}: give a number from 0 to below 1")
        if not self.target_modules or not all(isinstance(name, str) for name in self.target_modules):
            raise UserError(f"target_modules is {self.target_modules!r}: give {ALL_LINEAR}, or names of layers")

    def new_lora(self, name: str, layer: nn.Module, generator: torch.Generator | None = None) -> LoRA:
        """Return an initialized adapter for the layer ``name``."""
        lora = LoRA(layer.in_features, layer.out_features, rank=self.rank, dropout=self.dropout, like=layer.weight)
        lora.scaling.fill_(self.alpha / self.rank)
        lora.initialize(generator)
        return lora

    @property
    def target_names(self) -> tuple[str, ...]:
        """Return ``target_modules`` as a tuple."""
        names = self.target_modules.split(",") if isinstance(self.target_modules, str) else self.target_modules
        return tuple(name.strip() for name in names if name.strip())

    def is_target(self, name: str) -> bool | None:
        """Return whether ``target_modules`` names a layer; None: not by name, but it is adapted if it is linear."""
        is_named = any(ends_with(name, target) for target in self.target_names)
        return None if ALL_LINEAR in self.target_names and not is_named else is_named

    def can_adapt(self, layer: nn.Module) -> bool:
        """Return whether there is an adapter for this kind of layer."""
        return type(layer).forward is nn.Linear.forward

    def find_targets(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt, in the model's order; UserError where a name fits no layer."""
        layers = {n: module for n, module in model.named_modules() if self.can_adapt(module) and ".lora." not in n}
        output_layer = getattr(model, "get_output_embeddings", lambda: None)()  # of a transformers model
        names = []
        for name, layer in layers.items():
            is_target = self.is_target(name)
            if is_target is None:
                is_output = layer is output_layer or ends_with(name, "lm_head")
                is_target = isinstance(layer, nn.Linear) and not is_output
            if is_target:
                names.append(name)
        missing = [t for t in self.target_names if t != ALL_LINEAR and not any(ends_with(name, t) for name in names)]
        if missing or not names:
            wanted = ", ".join(missing) or self.target_modules
            last_parts = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"no layer is called {wanted}: there are {last_parts}, and the words "
                            f"{', '.join(self.words)}")  # fmt: skip
        return names


def ends_with(name: str, end: str) -> bool:
    """Return whether ``name`` ends with the parts ``end``: ``a.q_proj`` with ``q_proj``, but not ``a.xq_proj``."""
    return name == end or name.endswith(f".{end}")


# ---- the model: adapted, off, merged, as before ------------------------------------------------------------------


def apply_lora(
    model: nn.Module, config: LoRAConfig | None = None, *, generator: torch.Generator | None = None, **settings
) -> list[str]:
    """Adapt ``model`` in place and freeze everything else; return the names of the adapted layers.

    Settings are the fields of the config: ``rank=8, alpha=16, ...``. ``generator`` draws A (default: torch's own).
    """
    if hasattr(model, "lora_config"):
        raise UserError("the model has an adapter already: remove_lora removes it")
    config = replace(config or LoRAConfig(), **settings)
    layers = {name: model.get_submodule(name) for name in config.find_targets(model)}
    loras = {name: config.new_lora(name, layer, generator) for name, layer in layers.items()}
    freeze(model, config)
    for name, layer in layers.items():
        attach(layer, loras[name])
    return list(layers)


def freeze(model: nn.Module, config: LoRAConfig) -> None:
    """Make no parameter trainable, and remember which were; the adapter is to be one of ``config``."""
    named = model.named_parameters(remove_duplicate=False)  # a parameter that two layers share has two names
    model.lora_trainable = {name for name, parameter in named if parameter.requires_grad}
    model.lora_config = config
    model.requires_grad_(False)


def lora_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the trained parameters, for the optimizer."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def disable_lora(model: nn.Module) -> Iterator[nn.Module]:
    """Inside ``with disable_lora(model):`` the model computes as it did before ``apply_lora``."""
    check_unmerged(model)
    loras = [layer.lora for layer in adapted_layers(model).values()]
    before = [lora.enabled for lora in loras]
    try:
        for lora in loras:
            lora.enabled = False
        yield model
    finally:
        for lora, enabled in zip(loras, before, strict=True):
            lora.enabled = enabled


def check_unmerged(model: nn.Module) -> None:
    """Raise UserError while the adapter is merged."""
    if any(layer.lora.merged for layer in adapted_layers(model).values()):
        raise UserError("the adapter is merged into the weights: unmerge_lora first")


@torch.no_grad()
def merge_lora(model: nn.Module, *, keep_base: bool = True) -> nn.Module:
    """Add the adapter to the weights, ``W + s·B A``; the forward pass then costs nothing extra.

    Args:
        keep_base: keep the adapter, and W on the CPU, so that ``unmerge_lora`` restores it bit for bit. False: the
            adapter is gone afterwards, and ``model`` is an ordinary model, to be saved or served.
    """
    layers = adapted_layers(model).values()
    if not layers:
        raise UserError("the model has no adapter: apply_lora or load_lora gives it one")
    check_unmerged(model)
    for layer in layers:
        lora, weight = layer.lora, layer.weight
        merged = weight.to(lora.scaling) + lora.delta(layer)
        if lora.base_weight is None:
            lora.base_weight = weight.detach().to("cpu", copy=True)
        weight.copy_(merged)
        lora.merged = True
    if not keep_base:
        for layer in layers:
            layer.lora.base_weight = None  # so that remove_lora leaves W + s·B A
        remove_lora(model)
    return model


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> nn.Module:
    """Give the layers the weights back that they had before ``merge_lora``, bit for bit."""
    layers = adapted_layers(model).values()
    if not any(layer.lora.merged for layer in layers):
        raise UserError("the adapter is not merged: merge_lora merges it")
    for layer in layers:
        layer.lora.unmerge(layer)
    return model


@torch.no_grad()
def remove_lora(model: nn.Module) -> None:
    """Remove the adapter: weights, trainable parameters, state dict and forward are as before ``apply_lora``."""
    for layer in adapted_layers(model).values():
        if layer.lora.base_weight is not None:
            layer.weight.copy_(layer.lora.base_weight)
        detach(layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in model.lora_trainable)
    del model.lora_config, model.lora_trainable


# ---- on disk -----------------------------------------------------------------------------------------------------


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Write ``<layer>.lora.A.weight``, ``<layer>.lora.B.weight`` of every layer and ``lora_config`` to one file."""
    torch.save(adapter_state(model) | {"lora_config": asdict(model.lora_config)}, path)


def load_lora(model: nn.Module, path: str | Path) -> None:
    """Adapt ``model`` with what ``save_lora`` wrote; UserError where it does not fit."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    config = LoRAConfig(**stored.pop("lora_config"))
    apply_lora(model, config, generator=torch.Generator(next(model.parameters()).device))  # torch's own stays as it is
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (stored, adapter_state(model))]
    if shapes[0] != shapes[1]:
        remove_lora(model)
        raise UserError(f"the adapter {path} does not fit this model: its layers, or their sizes, are others")
    model.load_state_dict(stored, strict=False)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return A and B of every layer, by their names in the model's state dict."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora." in f".{name}"}
