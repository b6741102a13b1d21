"""Converts ``ModelConfig`` to and from Hugging Face's ``config.json``, for each family.

The families have different names for the same setting, and different defaults. This file is the only place that knows
them. A setting that our model does not support is refused by name, never ignored.
"""

import json
import math
from pathlib import Path
from typing import Any

from minillm.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# The defaults of the families' configuration classes: those that they share, and those of each family.
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2,
    },
    "qwen2": {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    },
    "qwen3": {
        "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        "head_dim": 128,
    },
    "mixtral": {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "bos_token_id": 1, "eos_token_id": 2, "num_experts": 8,
    },
    "qwen2_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False, "n_shared_experts": 1, "shared_expert_gate": True,
    },
    "qwen3_moe": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": False,
    },
    "glm4_moe": {
        "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "n_shared_experts": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip
# Settings that are the same in all models of a family.
FIXED: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True},
    "qwen3_moe": {"use_qk_norm": True},
    "glm4_moe": {"scoring_func": "sigmoid"},
}
BIASED = ("qwen2", "qwen2_moe", "glm4_moe")
WINDOWED = ("mistral", "mixtral")
# The names of the number of experts; transformers 4 and 5 both read the first one.
N_EXPERTS = {
    "mixtral": ("num_local_experts", "num_experts"),
    "qwen2_moe": ("num_experts",),
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "glm4_moe": ("n_routed_experts", "num_local_experts", "num_experts"),
}
MOE_FIELDS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace",
    "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "shared_expert_intermediate_size",
    "shared_expert_gate", "mlp_only_layers", "decoder_sparse_step",
)  # fmt: skip
GLM_FIELDS = (
    "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "first_k_dense_replace", "norm_topk_prob",
    "routed_scaling_factor", "n_group", "topk_group",
)  # fmt: skip
CHOOSING = ("qwen2_moe", "qwen3_moe")  # families that list the blocks with experts
# These may be null: there is none, or (the last two) it follows from the other sizes.
MAY_BE_NULL = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "head_dim", "num_key_value_heads",
)  # fmt: skip
# The defaults of MiniMind 3's configuration class, and those in which MiniMind 2's differs.
MINIMIND: dict[str, Any] = {
    "vocab_size": 6400, "hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True,
    "head_dim": None,
}  # fmt: skip
MINIMIND_2: dict[str, Any] = {
    "hidden_size": 512, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
}  # fmt: skip
LARGEST = 2**31 - 1  # largest integer in a configuration, so that torch can represent products of several
ROPE_KEYS_ELSEWHERE = ("rope_theta", "partial_rotary_factor", "type")


def to_hf(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Return the ``config.json`` of a ``ModelConfig`` given as a dict, readable by transformers 4 and 5."""
    values = dict(values)
    rope = {"rope_type": "default", "rope_theta": values["rope_theta"]} | (values.pop("rope_scaling") or {})
    if rope["rope_type"] == "dynamic" and "original_max_position_embeddings" in rope:
        # In transformers, dynamic scaling begins after max_position_embeddings; for us that is the longest sequence.
        values["max_position_embeddings"] = rope["original_max_position_embeddings"]
    moe = {name: values.pop(name) for name in MOE_FIELDS}
    qk_norm, bias = values.pop("use_qk_norm"), values.pop("attention_bias")
    factor, window = values.pop("partial_rotary_factor"), values.pop("sliding_window")
    del values["scoring_func"]
    special: dict[str, Any] = {}
    if model_type in WINDOWED:
        special["sliding_window"] = window
    elif model_type in ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"):
        special["use_sliding_window"] = False
    if model_type in N_EXPERTS:
        special |= {N_EXPERTS[model_type][0]: moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    if model_type in CHOOSING:
        names = ("moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
        only_dense = {*range(moe["first_k_dense_replace"]), *moe["mlp_only_layers"]}
        special |= {name: moe[name] for name in names} | {"mlp_only_layers": sorted(only_dense)}
    if model_type == "qwen2_moe":
        # The last two are our own keys: for transformers there is one shared expert with a gate of zeros.
        names = ("shared_expert_intermediate_size", "n_shared_experts", "shared_expert_gate")
        special |= {"qkv_bias": bias} | {name: moe[name] for name in names}
    elif model_type == "glm4_moe":
        special |= {name: moe[name] for name in GLM_FIELDS}
        special |= {"use_qk_norm": qk_norm, "partial_rotary_factor": factor, "num_nextn_predict_layers": 0}
        rope["partial_rotary_factor"] = factor  # newer releases of transformers read it from here; the default is 0.5
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **values,
        **special,
        "rope_parameters": rope,
        # Releases before 5 read this key; None is their "default".
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "hidden_act": "silu",
        "attention_bias": bias,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def from_hf(raw: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return the values of ``ModelConfig`` (its field ``names``) for a parsed ``config.json``.

    Missing keys get the defaults of transformers.

    Raises:
        UserError: the family is not supported, or the file uses a setting that our model does not have.
    """
    raw = _from_minimind(raw) if raw.get("model_type") == "minimind" else raw
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        supported = ", ".join((*ARCHITECTURES, "minimind"))
        raise UserError(f"model_type {model_type!r} is not supported; supported are: {supported}")
    # A checkpoint may have either or both; of both, transformers uses the first.
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling is {rope!r}: it must be an object with rope_type and its settings")
    given = {name: raw[name] for name in (names & raw.keys()) - {"rope_scaling"}}
    given |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    given |= _n_experts(raw, model_type)
    values = COMMON_DEFAULTS | FAMILY_DEFAULTS[model_type] | given | FIXED.get(model_type, {})
    _refuse_unsupported(raw, values, model_type)
    if model_type not in WINDOWED:
        values.pop("sliding_window", None)  # Qwen's files have a number that use_sliding_window switches off
    if model_type in CHOOSING:
        values |= _dense_layers(raw.get("mlp_only_layers") or [])
    else:
        values.pop("mlp_only_layers", None)
        values.pop("decoder_sparse_step", None)
    if model_type == "qwen2_moe":
        values["attention_bias"] = raw.get("qkv_bias", True)  # transformers' class ignores attention_bias
    else:
        values.pop("shared_expert_intermediate_size", None)
        values.pop("shared_expert_gate", None)
    if model_type not in N_EXPERTS or values["num_experts"] == 0:  # with 0, transformers' sparse classes are dense
        values = {name: value for name, value in values.items() if name not in MOE_FIELDS}
    null_names = [name for name, value in values.items() if value is None and name not in MAY_BE_NULL]
    if null_names:
        raise UserError(f"the configuration has null instead of a value for: {', '.join(sorted(null_names))}")
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values.get("head_dim") is None:
        values["head_dim"] = _quotient(values["hidden_size"], values["num_attention_heads"])
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = (values["eos_token_id"] or [None])[0]
    values["rope_scaling"] = scaling = _rope_scaling(raw, rope, values["max_position_embeddings"])
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    are_valid = type(original) is int and original <= LARGEST and isinstance(factor, int | float) and 1 <= factor <= 1e9
    if scaling["rope_type"] == "dynamic" and are_valid:
        values["max_position_embeddings"] = int(original * factor)  # see to_hf
    return values


def _from_minimind(raw: dict[str, Any]) -> dict[str, Any]:
    """Return MiniMind's own configuration as one of the families, with MiniMind's defaults.

    Version 2 (its files have ``n_routed_experts``) is a Llama; with experts it is a Qwen2-MoE without a gate, or
    without shared experts a Mixtral. Version 3 is a Qwen3, or with experts a Qwen3-MoE.
    """
    is_version_2, has_experts = "n_routed_experts" in raw, bool(raw.get("use_moe"))
    unsupported = [f"{name}={raw[name]!r}" for name in ("dim", "dropout", "inference_rope_scaling") if raw.get(name)]
    if unsupported:
        raise UserError(
            f"this configuration of MiniMind has {', '.join(unsupported)}: supported are versions 2 and 3, with "
            f"dropout 0 and inference_rope_scaling false (edit these two); of older releases give the .pth"
        )
    values = MINIMIND | (MINIMIND_2 if is_version_2 else {}) | raw
    if values.get("intermediate_size") is None:
        ratio, width = 8 / 3 if is_version_2 else math.pi, values["hidden_size"]
        is_width = type(width) is int and 0 < width <= LARGEST  # ModelConfig refuses other values
        values["intermediate_size"] = 64 * math.ceil(width * ratio / 64) if is_width else 0
    values.setdefault("moe_intermediate_size", values["intermediate_size"])
    if is_version_2:
        values["model_type"] = "llama"
    else:
        values["model_type"] = "qwen3_moe" if has_experts else "qwen3"
    if is_version_2 and has_experts:
        values |= _experts_of_minimind_2(values)
    elif has_experts and "norm_topk_prob" not in raw and values["num_experts_per_tok"] == 1:
        raise UserError(
            "this configuration of MiniMind has no norm_topk_prob: releases before September 2026 use 1 as the weight "
            "of a token's only expert, so add true; later ones use its probability, so add false"
        )
    unused = () if has_experts else ("n_routed_experts", "num_experts", "scoring_func")
    return {name: value for name, value in values.items() if name not in unused}


def _experts_of_minimind_2(values: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of MiniMind 2's experts under Qwen2-MoE's names; each is as wide as the dense layer."""
    n_shared, width = values.get("n_shared_experts", 1), values["intermediate_size"]
    are_numbers = type(n_shared) is type(width) is int  # ModelConfig refuses other values
    return {
        "model_type": "qwen2_moe" if n_shared else "mixtral",
        "num_experts": values["n_routed_experts"],
        "n_shared_experts": n_shared,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": n_shared * width if are_numbers else width,
        "shared_expert_gate": False,
        "qkv_bias": False,
        # MiniMind's class never normalises the weight of a single expert, whatever the file says.
        "norm_topk_prob": values["norm_topk_prob"] and values["num_experts_per_tok"] != 1,
    }


def _quotient(hidden_size, n_heads) -> int | None:
    """Return the width of a head, rounded as in transformers; None for invalid sizes, which are reported later."""
    return hidden_size // n_heads if type(hidden_size) is type(n_heads) is int and n_heads > 0 else None


def _n_experts(raw: dict[str, Any], model_type: str) -> dict[str, Any]:
    given = {name: raw[name] for name in N_EXPERTS.get(model_type, ()) if name in raw}
    if any(value != next(iter(given.values())) for value in given.values()):
        raise UserError(f"the configuration gives two numbers of experts: {given}; leave the wrong one out")
    return {"num_experts": next(iter(given.values()))} if given else {}


def _dense_layers(only_dense: list) -> dict[str, Any]:
    """Return our names for ``mlp_only_layers``: how many of the first blocks are dense, and which others."""
    numbers = sorted(set(only_dense)) if all(type(layer) is int for layer in only_dense) else only_dense
    n_first = next((n for n, layer in enumerate(numbers) if layer != n), len(numbers))
    return {"first_k_dense_replace": n_first, "mlp_only_layers": tuple(numbers[n_first:])}


def _rope_scaling(raw: dict[str, Any], rope: dict[str, Any], max_positions: int) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {name: value for name, value in rope.items() if name not in ROPE_KEYS_ELSEWHERE and value is not None}
    if kind in ("yarn", "llama3") and raw.get("original_max_position_embeddings"):
        # This key has precedence in transformers.
        scaling["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    if kind == "dynamic" and scaling.get("original_max_position_embeddings") != max_positions:
        scaling.pop("original_max_position_embeddings", None)  # transformers ignores it
    return scaling | {"rope_type": kind}


def read_json(path: Path) -> dict[str, Any]:
    """Return the parsed ``config.json`` at ``path``, or in the directory ``path``."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no model configuration: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # broken JSON or UTF-8, huge numbers, deep nesting
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object with the model's settings, but a {type(content).__name__}")
    return content


def _refuse_unsupported(raw: dict[str, Any], values: dict[str, Any], model_type: str) -> None:
    """Raise UserError for settings that change what transformers computes, but that ``ModelConfig`` has no field for.

    ``ModelConfig`` itself refuses combinations of its fields that no family has.
    """
    is_glm, is_windowed = model_type == "glm4_moe", model_type in WINDOWED
    attention = "sliding_attention" if is_windowed and values.get("sliding_window") else "full_attention"
    layer_types, only_dense = raw.get("layer_types") or [], raw.get("mlp_only_layers") or []
    for name, value in (("layer_types", layer_types), ("mlp_only_layers", only_dense)):
        if not isinstance(value, list):
            raise UserError(f"{name} is {value!r}: it must be a list")
    has_norm = FIXED.get(model_type, {}).get("use_qk_norm", False)
    unsupported = {  # None: the setting is absent, or has the value that our model computes
        "attention_bias": None if model_type in BIASED else raw.get("attention_bias") or None,
        "mlp_bias": raw.get("mlp_bias") or None,
        "use_qk_norm": None if is_glm else _unless(has_norm, raw.get("use_qk_norm")),
        "use_sliding_window": (not is_windowed and raw.get("use_sliding_window")) or None,
        "layer_types": layer_types if any(kind != attention for kind in layer_types) else None,
        "hidden_act": _unless("silu", raw.get("hidden_act")),
        "attention_dropout": raw.get("attention_dropout") or None,
        "pretraining_tp": _unless(1, raw.get("pretraining_tp")),
        "scoring_func": _unless("sigmoid" if is_glm else "softmax", raw.get("scoring_func")),
        "decoder_sparse_step": None if model_type in CHOOSING else _unless(1, raw.get("decoder_sparse_step")),
        "mlp_only_layers": None if model_type in CHOOSING else only_dense or None,
        "n_shared_experts": (model_type in ("mixtral", "qwen3_moe") and raw.get("n_shared_experts")) or None,
        "router_jitter_noise": raw.get("router_jitter_noise") or None,
        "per_layer_config": raw.get("per_layer_config") or None,
        "quantization_config": raw.get("quantization_config"),
    }
    if model_type not in N_EXPERTS:
        names = {name for family_names in N_EXPERTS.values() for name in family_names}
        unsupported |= {name: raw.get(name) or None for name in sorted(names)}
    settings = [f"{name}={value!r}" for name, value in unsupported.items() if value is not None]
    if settings:
        raise UserError(
            f"the configuration uses what this model does not have: {', '.join(settings)} (model_type {model_type!r}); "
            f"correct the file, or use another model"
        )


def _unless(supported, value):
    """Return ``value``, or None if it is the supported one."""
    return None if value is None or value == supported else value
