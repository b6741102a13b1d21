"""Experts: fused in memory, one by one on disk.

In memory a sparse layer has two parameters for all its experts, so that one grouped product serves them. Checkpoints
hold three matrices per expert, named ``mlp.experts.3.gate_proj.weight`` (Qwen3-MoE, GLM-4.5) or, in Mixtral's own way,
``block_sparse_moe.experts.3.w1.weight``. What here is called a piece is a stored tensor and its place in a parameter.

Every shared expert of Qwen2-MoE has a gate on disk. One without is stored with a gate of zeros, which is sigmoid(0) =
1/2, and with twice its down projection: exactly the same function, and both factors are powers of two.

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


SHARED, SHARED_GATE = ".mlp.shared_expert.", ".mlp.shared_expert_gate.weight"


class Piece(NamedTuple):
    """A tensor on disk, and the index of the part of the parameter in memory that it fills; ``()``: all of it.

    ``scale``: what is stored is that multiple of what is in memory.
    """

    name: str
    index: tuple[int | slice, ...] = ()
    scale: float = 1.0


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
    return [Piece(stored, scale=stored_scale(name.removesuffix(".weight"), config))]


def stored_scale(layer: str, config) -> float:
    """Return which multiple of the weight of ``layer`` stands on disk: 2 where a gate of zeros halves its output.

    Args:
        config: a ``ModelConfig``; any other model is as its files are.
    """
    is_ungated = isinstance(config, ModelConfig) and config.model_type == "qwen2_moe" and not config.shared_expert_gate
    return 2.0 if is_ungated and layer.endswith(SHARED + "down_proj") else 1.0


def zero_gates(config: ModelConfig) -> list[str]:
    """Return the names of the gates that are stored for shared experts without one; each is zeros (1, D)."""
    if config.model_type != "qwen2_moe" or config.shared_expert_gate:
        return []
    layers = filter(config.has_experts, range(config.num_hidden_layers))
    return [f"model.layers.{layer}{SHARED_GATE}" for layer in layers]


def pieces_of_minimind(name: str, config: ModelConfig, stored: Iterable[str]) -> list[Piece] | None:
    """Return the pieces of a shared expert as MiniMind stores it, ungated; None where ``stored`` has it otherwise.

    Version 2 has shared experts one by one, ``mlp.shared_experts.0.gate_proj.weight``: side by side they are one.
    Version 1 has a single one, ``mlp.shared_experts.gate_proj.weight``.
    """
    layer, is_shared, part = name.partition(SHARED)
    if not is_shared:
        return None
    if (whole := f"{layer}.mlp.shared_experts.{part}") in stored:
        return [Piece(whole)]
    width = config.shared_expert_intermediate_size // config.n_shared_experts
    pieces = []
    for number in range(config.n_shared_experts):
        cut = slice(number * width, (number + 1) * width)
        index = (slice(None), cut) if part == "down_proj.weight" else (cut,)
        pieces.append(Piece(f"{layer}.mlp.shared_experts.{number}.{part}", index))
    return pieces if pieces[0].name in stored else None


def prediction_layer_names(names: Iterable[str], config: ModelConfig) -> set[str]:
    """Return those of ``names`` that belong to next-token-prediction layers, which our model does not have.

    GLM-4.5 stores them behind the others, as ``model.layers.<num_hidden_layers>`` and up (multi-token prediction,
    DeepSeek-V3, 2024, section 2.2): they serve training and speculative decoding, and change no logits.
    """
    names = list(names)
    found = [match for match in map(_PREDICTION_LAYER.fullmatch, names) if match]
    prefixes = tuple(match[1] for match in found if int(match[2]) >= config.num_hidden_layers)
    return {name for name in names if config.model_type == "glm4_moe" and name.startswith(prefixes)}
