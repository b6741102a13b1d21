"""Maps experts in memory, which are fused, to experts on disk, which are stored one by one.

In memory a sparse layer has two parameters for all its experts, so that one grouped product computes them. A checkpoint
has three matrices per expert, named ``mlp.experts.3.gate_proj.weight`` (Qwen3-MoE, GLM-4.5) or
``block_sparse_moe.experts.3.w1.weight`` (Mixtral). A *piece* is a stored tensor and the part of a parameter it fills.

Every shared expert of Qwen2-MoE has a gate on disk. A shared expert without a gate is stored with a gate of zeros,
sigmoid(0) = 1/2, and twice its down projection: exactly the same function, because both factors are powers of two.

Legend: D hidden, E experts, F feed-forward width of an expert.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from minillm.config import ModelConfig

# The names of the gate, up and down matrices of an expert.
MATRIX_NAMES = {"mixtral": ("w1", "w3", "w2")}
USUAL_MATRIX_NAMES = ("gate_proj", "up_proj", "down_proj")
# Only next-token-prediction layers have this joint projection of the hidden state and the next embedding.
_PREDICTION_LAYER = re.compile(r"(model\.layers\.(\d+)\.)eh_proj\.weight")

SHARED, SHARED_GATE = ".mlp.shared_expert.", ".mlp.shared_expert_gate.weight"


class Piece(NamedTuple):
    """A tensor on disk, and the part of a parameter in memory that it fills."""

    name: str  # on disk
    index: tuple[int | slice, ...] = ()  # of the part; (): the whole parameter
    scale: float = 1.0  # the stored numbers are this multiple of those in memory


def pieces_of(name: str, config: ModelConfig) -> list[Piece]:
    """Return the stored tensors that parameter or buffer ``name`` consists of, in the order of the experts.

    ``experts.gate_up_proj`` (E, 2F, D) is E × (gate (F, D), up (F, D)), ``experts.down_proj`` (E, D, F) is
    E × down (D, F); every other parameter is one tensor.
    """
    gate, up, down = MATRIX_NAMES.get(config.model_type, USUAL_MATRIX_NAMES)
    stored_name = name.replace(".mlp.", ".block_sparse_moe.") if config.model_type == "mixtral" else name
    layer, is_expert, kind = stored_name.partition(".experts.")
    experts, width = range(config.num_experts), config.moe_intermediate_size
    if is_expert and kind == "down_proj":
        return [Piece(f"{layer}.experts.{e}.{down}.weight", (e,)) for e in experts]
    if is_expert and kind == "gate_up_proj":
        halves = ((gate, slice(width)), (up, slice(width, None)))
        return [Piece(f"{layer}.experts.{e}.{matrix}.weight", (e, rows)) for e in experts for matrix, rows in halves]
    return [Piece(stored_name, scale=stored_scale(name.removesuffix(".weight"), config))]


def stored_scale(layer: str, config) -> float:
    """Return the factor by which the weight of ``layer`` is larger on disk: 2 if a gate of zeros halves its output.

    Args:
        config: a ``ModelConfig``; models of other libraries are the same in memory and on disk.
    """
    is_ungated = isinstance(config, ModelConfig) and config.model_type == "qwen2_moe" and not config.shared_expert_gate
    return 2.0 if is_ungated and layer.endswith(SHARED + "down_proj") else 1.0


def zero_gates(config: ModelConfig) -> list[str]:
    """Return the names on disk of the gates of shared experts without a gate; each is zeros (1, D)."""
    if config.model_type != "qwen2_moe" or config.shared_expert_gate:
        return []
    layers = filter(config.has_experts, range(config.num_hidden_layers))
    return [f"model.layers.{layer}{SHARED_GATE}" for layer in layers]


def pieces_of_minimind(name: str, config: ModelConfig, stored: Iterable[str]) -> list[Piece] | None:
    """Return the pieces of a shared expert in MiniMind's layout, without a gate; None if ``stored`` has another layout.

    Version 2 stores several shared experts, ``mlp.shared_experts.0.gate_proj.weight``; concatenated they are one.
    Version 1 has only one, ``mlp.shared_experts.gate_proj.weight``.
    """
    layer, is_shared, part = name.partition(SHARED)
    if not is_shared:
        return None
    if (single_expert := f"{layer}.mlp.shared_experts.{part}") in stored:
        return [Piece(single_expert)]
    width = config.shared_expert_intermediate_size // config.n_shared_experts
    pieces = []
    for number in range(config.n_shared_experts):
        features = slice(number * width, (number + 1) * width)
        index = (slice(None), features) if part == "down_proj.weight" else (features,)
        pieces.append(Piece(f"{layer}.mlp.shared_experts.{number}.{part}", index))
    return pieces if pieces[0].name in stored else None


def prediction_layer_names(names: Iterable[str], config: ModelConfig) -> set[str]:
    """Return those of ``names`` that belong to next-token-prediction layers, which our model does not have.

    GLM-4.5 stores them after the other layers, from ``model.layers.<num_hidden_layers>`` on (multi-token prediction,
    DeepSeek-V3, 2024, section 2.2). They are for training and speculative decoding, and change no logits.
    """
    names = list(names)
    matches = [match for match in map(_PREDICTION_LAYER.fullmatch, names) if match]
    prefixes = tuple(match[1] for match in matches if int(match[2]) >= config.num_hidden_layers)
    return {name for name in names if config.model_type == "glm4_moe" and name.startswith(prefixes)}
