"""Rotary position embedding: a position turns each pair of a head's numbers by an angle.

Su et al., RoFormer (2021), section 3.2. The dot product of a query at position m and a key at position n then
depends on the positions only through m − n. Pair i turns by position · θ^(−2i/R): the first pairs turn fast and tell
near positions apart, the last ones slowly and tell far ones apart.

Past the positions that a model was trained on, the slow pairs reach angles that it has never seen. The variants
(``rope_scaling``) lower the frequencies, each in its own way, so that ``factor`` times as many positions fit.

Legend: B batch, T positions, H heads, K head width, R ≤ K the numbers of a head that are turned (``rotary_dim``).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.kernels.rotation import rotate


def rope_tables(position_ids: Tensor, config: ModelConfig, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles, each (B, T, 1, R/2), in ``dtype`` (at least float32).

    With yarn both are multiplied by the attention factor.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    frequencies, attention_factor = rope_frequencies(position_ids, config, dtype=dtype)
    angles = position_ids[..., None, None].to(dtype) * frequencies  # (B, T, 1, R/2)
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if attention_factor == 1 else (cos * attention_factor, sin * attention_factor)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` (B, T, H, K) turned by the angles of ``rope_tables``, in the dtype of ``x``.

    Number i is paired with number i + R/2 (the layout of Hugging Face's weights; the paper pairs neighbours,
    which is the same up to a permutation of the weights). The last K − R numbers stay as they are (GLM).
    """
    return rotate(x, cos, sin)


def rope_frequencies(position_ids: Tensor, config: ModelConfig, *, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (R/2,) in ``dtype``, and the factor on cos and sin.

    Only ``dynamic`` looks at the positions in use.
    """
    variant = (config.rope_scaling or {}).get("rope_type", "default")
    return VARIANTS[variant](position_ids, config, dtype)


def original_length(config: ModelConfig) -> int:
    """Return the positions that ``config`` has without its ``rope_scaling``: the length trained on before it.

    Where ``original_max_position_embeddings`` is absent, transformers takes ``max_position_embeddings``; so do we.
    ``linear`` needs no original length and states none: its positions are the original ones times its factor.
    """
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        return max(1, round(config.max_position_embeddings / scaling["factor"]))
    return scaling.get("original_max_position_embeddings") or config.max_position_embeddings


# ---- the variants ----------------------------------------------------------------------------------


def _default(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Pair i: θ^(−2i/R) (RoFormer, section 3.2.2)."""
    return 1 / config.rope_theta ** _exponents(position_ids, config, dtype), 1.0


def _linear(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, float]:
    """All frequencies divided by ``factor``, as if positions were (Chen et al., Position Interpolation, 2023, 3.2)."""
    return _default(position_ids, config, dtype)[0] / config.rope_scaling["factor"], 1.0


def _dynamic(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, float]:
    """A larger θ the longer the sequence: the slowest pair is interpolated, the fastest untouched.

    NTK-aware interpolation (Peng et al., YaRN, 2023, section 3.1, definition 1) with the stretch s that the longest
    position in use asks for (section 3.3, "dynamic scaling"; transformers' form: s = factor·L/L₀ − (factor − 1)).
    Up to the original length L₀ nothing changes.

    L belongs to the whole batch, its longest row decides, and cached keys keep the angles of the length at which
    they were computed; both as in transformers. Unlike there, the same call always gives the same angles: no length
    is remembered from the sequences before.
    """
    factor, original = config.rope_scaling["factor"], _original(config)
    longest = position_ids.max() + 1  # stays on the device
    stretch = factor * longest.to(dtype).clamp(min=original) / original - (factor - 1)
    # A single pair has the frequency 1 whatever the base, and its power would be 2/0.
    power = config.rotary_dim / max(config.rotary_dim - 2, 1)
    return 1 / (config.rope_theta * stretch**power) ** _exponents(position_ids, config, dtype), 1.0


def _llama3(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Long waves divided by ``factor``, short ones untouched, those between blended.

    The formula is that of Llama 3.1's reference code (``apply_scaling``); for the training that it belongs to see
    Grattafiori et al., The Llama 3 Herd of Models (2024), section 3.4.2. The bounds: waves longer than
    L₀/low_freq_factor positions, shorter than L₀/high_freq_factor; between them linear in the turns made within L₀.
    """
    frequencies, scaling = _default(position_ids, config, dtype)[0], config.rope_scaling
    turns = _original(config) * frequencies / (2 * math.pi)  # (R/2,) full turns within the original length
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"]), 1.0


def _yarn(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Pairs with less than ``beta_slow`` turns in L₀ divided by ``factor``, with more than ``beta_fast`` untouched.

    Peng et al., YaRN (2023), section 3.2 ("NTK-by-parts", α = beta_slow = 1, β = beta_fast = 32), and section 3.4 for
    the attention factor 0.1·ln(factor) + 1 on cos and sin, which makes up for attention that gets flatter with more
    keys. As in the authors' code the blend is linear in the pair's index between the two bounds, which are whole
    numbers unless ``truncate`` is false. ``mscale`` and ``mscale_all_dim`` are DeepSeek-V2's weights on that logarithm.
    """
    frequencies, scaling = _default(position_ids, config, dtype)[0], config.rope_scaling
    dim, log_theta, original = config.rotary_dim, math.log(config.rope_theta), _original(config)

    def pair_with(turns: float) -> float:  # the inverse of L₀·θ^(−2i/R)/2π = turns
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * log_theta)

    first, last = pair_with(scaling.get("beta_fast") or 32), pair_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    index = torch.arange(dim // 2, device=position_ids.device, dtype=dtype)
    kept = 1 - ((index - first) / (last - first)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"]), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: dict) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return mscale(numerator) / mscale(denominator) if numerator and denominator else mscale(1)


VARIANTS: dict[str, Callable[[Tensor, ModelConfig, torch.dtype], tuple[Tensor, float]]] = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
}  # fmt: skip


def _exponents(position_ids: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    return torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=dtype) / config.rotary_dim  # (R/2,)


def _original(config: ModelConfig) -> int:
    return config.rope_scaling.get("original_max_position_embeddings") or config.max_position_embeddings


# ---- turning ---------------------------------------------------------------------------------------
