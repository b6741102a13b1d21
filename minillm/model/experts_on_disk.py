"""Experts: fused in memory, one by one on disk.

In memory a sparse layer has two parameters for all its experts, so that one grouped product serves them. Checkpoints
hold three matrices per expert, named ``mlp.experts.3.gate_proj.weight`` (Qwen3-MoE, GLM-4.5) or, in Mixtral's own way,
``block_sparse_moe.experts.3.w1.weight``. What here is called a piece is a stored tensor and its place in a parameter.

Legend: D hidden, E experts, F feed-forward width of an expert.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from minillm.config import ModelConfig

# The names of gate, up and down matrix.
STORED = {"mixtral": ("w1", "w3", "w2")}
USUAL = ("gate_proj", "up_proj", "down_proj")
# What only next-token-prediction layers have: the joint projection of hidden state and next embedding.
_PREDICTION_LAYER = re.compile(r"(model\.layers\.(\d+)\.)eh_proj\.weight")


class Piece(NamedTuple):
    """A tensor on disk, and the index of the part of the parameter in memory that it fills; ``()``: all of it."""

    name: str
    index: tuple[int | slice, ...] = ()


def pieces_of(name: str, config: ModelConfig) -> list[Piece]:
    """Return the stored tensors that parameter or buffer ``name`` consists of, in the order of the experts.

    ``experts.gate_up_proj`` (E, 2F, D) is E × (gate (F, D), up (F, D)), ``experts.down_proj`` (E, D, F) is
    E × down (D, F); everything else is stored as it is.
    """
    gate, up, down = STORED.get(config.model_type, USUAL)
    stored = name.replace(".mlp.", ".block_sparse_moe.") if config.model_type == "mixtral" else name
    layer, is_expert, kind = stored.partition(".experts.")
    experts, width = range(config.num_experts), config.moe_intermediate_size
    if is_expert and kind == "down_proj":
        return [Piece(f"{layer}.experts.{e}.{down}.weight", (e,)) for e in experts]
    if is_expert and kind == "gate_up_proj":
        halves = ((gate, slice(width)), (up, slice(width, None)))
        return [Piece(f"{layer}.experts.{e}.{part}.weight", (e, rows)) for e in experts for part, rows in halves]
    return [Piece(stored)]


def prediction_layer_names(names: Iterable[str], config: ModelConfig) -> set[str]:
    """Return those of ``names`` that belong to next-token-prediction layers, which our model does not have.

    GLM-4.5 stores them behind the others, as ``model.layers.<num_hidden_layers>`` and up (multi-token prediction,
    DeepSeek-V3, 2024, section 2.2): they serve training and speculative decoding, and change no logits.
    """
    names = list(names)
    found = [match for match in map(_PREDICTION_LAYER.fullmatch, names) if match]
    prefixes = tuple(match[1] for match in found if int(match[2]) >= config.num_hidden_layers)
    return {name for name in names if config.model_type == "glm4_moe" and name.startswith(prefixes)}
