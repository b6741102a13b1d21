"""Counts parameters: all of them, those that are trained, and those that autocast copies.

They are counted on a model whose tensors have shapes and no memory (torch's device "meta"), so that the count cannot
differ from the model's.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.lora import apply_lora
from minillm.model import Transformer
from minillm.model.moe import Experts
from minillm.model.sizes import active_parameters, trained_parameters


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters; a tied matrix counts once."""

    total: int
    """All of them, an adapter's included."""
    active: int
    """Those that one token goes through."""
    trained: int
    """Those that have gradients and optimizer state."""
    blocks: tuple[int, ...]
    """All of each block."""
    trained_blocks: tuple[int, ...]
    """The trained ones of each block."""
    cast_blocks: tuple[int, ...]
    """Of each block those whose copies in autocast's dtype live as long as the activations."""
    cached_blocks: tuple[int, ...]
    """The part of these that autocast copies by itself, and holds to the end of the forward pass in any case."""
    embedding: int
    """V·D, of one embedding matrix."""

    @property
    def outside(self) -> int:
        """All that is in no block: embedding, output layer if it is not tied, last norm."""
        return self.total - sum(self.blocks)


def meta_model(config: ModelConfig, *, lora_rank: int = 0) -> Transformer:
    """Return the model without memory for its numbers, with an adapter on all linear layers if ``lora_rank``."""
    with torch.device("meta"):
        model = Transformer(config)
        if lora_rank:
            apply_lora(model, rank=lora_rank)
    return model


def count_parameters(model: Transformer) -> Parameters:
    """Return the numbers of ``model``."""
    total, active = active_parameters(model)
    blocks = list(model.model.layers)
    return Parameters(
        total=total,
        active=active,
        trained=trained_parameters(model),
        blocks=tuple(sum(p.numel() for p in block.parameters()) for block in blocks),
        trained_blocks=tuple(trained_parameters(block) for block in blocks),
        cast_blocks=tuple(_linear(block) + _experts(block) for block in blocks),
        cached_blocks=tuple(map(_linear, blocks)),
        embedding=model.model.embed_tokens.weight.numel(),
    )


def _linear(block: nn.Module) -> int:
    """Return the numbers of the linear layers without an adapter, which keep the short copy of their weight.

    The gradient of their input needs it. An adapted layer rebuilds it; a router computes in float32.
    """
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    own = (m for name, m in layers.items() if "lora" not in m._modules and ".lora." not in name)
    return sum(module.weight.numel() for module in own)


def _experts(block: nn.Module) -> int:
    """Return the numbers of the experts, whose products keep the short copy too."""
    found = (module for module in block.modules() if isinstance(module, Experts))
    return sum(module.gate_up_proj.numel() + module.down_proj.numel() for module in found)
