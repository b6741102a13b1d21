"""Bare ``.pth`` state dicts: what they hold under other names, and what their shapes tell of the model.

Three layouts are read: ours, which is Hugging Face's; MiniMind's of versions 2 and 3, which uses the same names and
keeps the tied matrix twice, in float16; and LLaMA's own (Touvron et al., 2023; ``layers.0.attention.wq.weight``), which
llama2.c, MiniMind 1 and the first releases of MiniMind 2 have, and where a head's rotary pairs are neighbours instead
of halves. A file has no settings, unless it brings llama2.c's ``model_args``: ``infer_config`` reads from the shapes
what they tell, and asks for the rest. Wrong heads, angles or weights of experts load without an error and answer
nonsense, so none of these is guessed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Tables that follow from the configuration; some releases stored them. Name: numbers of a head per column.
TABLES = {"freqs_cos": 1, "freqs_sin": 1, "cos_cached": 1, "sin_cached": 1, "inv_freq": 2, "pos_cis": 2, "mask": 0}
NOT_IN_SHAPES = ("num_attention_heads", "head_dim", "rope_theta", "max_position_embeddings", "rms_norm_eps",
                 "bos_token_id", "eos_token_id")  # fmt: skip
# llama2.c's model_args in our names. Its rotary angles are fixed.
MODEL_ARGS = {"n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
              "max_seq_len": "max_position_embeddings"}  # fmt: skip
MODEL_ARGS_THETA = 1e4
WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
OLD_NAMES = {
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm", "layers": "model.layers",
    "attention": "self_attn", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip
MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_MIXTRAL = re.compile(r"\.mlp\.(experts\.\d+\.)(gate|up|down)_proj\.")
_SHARED = r"shared_experts?\.(\d+\.)?gate_proj\.weight"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def read_pth(path: Path, *, shapes_only: bool = False) -> dict[str, Tensor]:
    """Return the tensors of the file, under their own names without wrappers; rotary tables included.

    A file of MiniMind's that ends in ``_resume.pth`` holds the weights under ``model``, next to the optimizer.

    Args:
        shapes_only: the tensors are to be looked at, not kept: they stay in the file where its format allows.

    Raises:
        UserError: the file holds other things than tensors, or objects, which would run code when loaded.
    """
    return _read(path, shapes_only)[0]


def _read(path: Path, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors as ``read_pth`` does, and the settings next to them, in our names."""
    settings = {}
    try:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=shapes_only)
        except RuntimeError:
            if not shapes_only:
                raise
            weights = torch.load(path, map_location="cpu", weights_only=True)  # a file of before torch 1.6
    except Exception as error:  # whatever a damaged file leads torch into; with weights_only no code of it runs
        first = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a plain state dict of tensors: {first or type(error).__name__}") from error
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        if isinstance(said := weights.get("model_args"), dict):
            settings = {MODEL_ARGS[key]: said[key] for key in MODEL_ARGS if key in said}
            settings.setdefault("rope_theta", MODEL_ARGS_THETA)
        weights = weights["model"]
    is_dict = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if is_dict and any(name.endswith(".lora.A.weight") for name in weights):
        raise UserError(
            f"{path} is an adapter, not a model: eval_model.py takes it as --lora_name {path}; "
            f"give --from_weight its model"
        )
    if not is_dict or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} is not a plain state dict of tensors")
    return {_unwrapped(name): tensor for name, tensor in weights.items()}, settings


def load_pth(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Return the weights of the file under Hugging Face's names, rotary tables left out, dtypes as stored.

    Raises:
        UserError: no plain state dict; two different matrices where ``config`` ties them.
    """
    stored = read_pth(path)
    weights = _renamed(stored)
    if config.tie_word_embeddings and not _is_tied(weights):
        raise UserError(
            f"{path} has an output matrix of its own ({OUTPUT} differs from {EMBEDDING}), the configuration ties "
            f"them: set tie_word_embeddings to False"
        )
    if _is_old(stored):
        for name, tensor in weights.items():
            is_whole = tensor.ndim == 2 and tensor.shape[0] % config.head_dim == 0  # if not, it is refused later
            if is_whole and name.endswith(("q_proj.weight", "k_proj.weight")):
                weights[name] = _halves_from_pairs(tensor, config.head_dim)
    if config.model_type == "mixtral":  # experts of MiniMind 2 without shared ones; only their names differ
        weights = {_MIXTRAL.sub(_mixtral_name, name): tensor for name, tensor in weights.items()}
    return weights


def infer_config(
    path: str | Path, *, given: Mapping[str, Any] | None = None, fallback: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the configuration of the weights in a ``.pth``, as far as their shapes tell it.

    They tell the sizes of vocabulary, layers and experts, QK-norm, attention bias, tying and the kind of the shared
    experts. The width of a head they tell only with QK-norm or a stored rotary table; without, ``num_attention_heads``
    (or ``head_dim``) must be given. Never in the shapes, and to be given: ``num_experts_per_tok`` and
    ``norm_topk_prob`` of a mixture of experts, and ``rope_theta`` where the names are LLaMA's own, which files of 1e4,
    5e5 and 1e6 have. Taken as usual: ``max_position_embeddings``, ``rope_theta`` of other files (1e6, ours and
    MiniMind's) and ``rms_norm_eps`` (1e-5; 1e-6 where the shapes are those of MiniMind 3).

    Args:
        given: keys of ModelConfig that the caller knows; where the file tells otherwise, that is an error.
        fallback: values for what neither ``given`` nor the file tells, such as a preset's; its ``num_attention_heads``
            counts only if its ``hidden_size``, where it has one, is that of the weights, and their names are ours.

    Raises:
        UserError: no plain state dict of a whole model; ``given`` contradicts it; what cannot be told is not given; a
            mixture of experts that no family holds.
    """
    stored, settings = _read(Path(path), shapes_only=True)
    weights = _renamed(stored)
    given = {name: value for name, value in (given or {}).items() if value is not None}
    preset = dict(fallback or {})
    if EMBEDDING not in weights or not any(_LAYER.match(name) for name in weights):
        raise UserError(
            f"{path} holds no whole model ({EMBEDDING} or the layers are missing); an adapter alone needs its base"
        )
    try:
        told = _sizes(weights) | _experts(weights)
        fallback = {name: value for name, value in preset.items() if name in NOT_IN_SHAPES}
        if _is_old(stored) or preset.get("hidden_size", told["hidden_size"]) != told["hidden_size"]:
            fallback.pop("num_attention_heads", None)  # a wrong number would load, and answer nonsense
        fallback |= _of_release(told) | settings
        told |= _heads(stored, weights, told, fallback | given, path)
    except UserError:
        raise  # it is a ValueError too, and says what is wrong
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} is not the state dict of a model of ours: {error} is missing, or of odd shape"
        ) from None
    differing = [
        f"{name} is {told[name]} there and {value} was given"
        for name, value in given.items()
        if name in told and told[name] != value
    ]
    if differing:
        raise UserError(
            f"the weights of {path} do not fit what was said: {'; '.join(differing)} "
            f"(what the file tells can be left out)"
        )
    for name, value in settings.items():
        if given.get(name, value) != value:
            raise UserError(f"{path} says itself that {name} is {value}, and {given[name]} was given; leave it out")
    _check_given(path, given, told, theta_is_known="rope_theta" in settings | given or not _is_old(stored))
    try:
        return ModelConfig(**(fallback | given | told))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_given(path: str | Path, given: Mapping[str, Any], told: Mapping[str, Any], *, theta_is_known: bool) -> None:
    """Raise UserError unless the caller has said what changes answers and is neither in the shapes nor in the file."""
    if not theta_is_known:
        raise UserError(
            f"{path} does not tell the angles of its positions: give rope_theta (--rope_theta 10000 for llama2.c, "
            f"LLaMA 1 and 2 and MiniMind 1, 500000 for Llama 3, 1000000 for MiniMind 2)"
        )
    if not told["num_experts"]:
        return
    if "num_experts_per_tok" not in given:
        raise UserError(
            f"{path} does not tell how many experts a token goes through: give num_experts_per_tok "
            f"(--use_moe --num_experts_per_tok 1 for MiniMind 3, 2 for MiniMind 2 and ours, as a rule)"
        )
    if "norm_topk_prob" not in given:
        raise UserError(
            f"{path} does not tell whether the weights of a token's experts are divided by their sum: give "
            f"norm_topk_prob (--norm_topk_prob 1 for most; 0 for MiniMind with one expert per token, if it is version "
            f"2, or version 3 of after 2026-09-17)"
        )


def _mixtral_name(match: re.Match) -> str:
    return f".block_sparse_moe.{match[1]}{MIXTRAL_NAMES[match[2]]}."


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _is_old(weights: Mapping[str, Tensor]) -> bool:
    return "tok_embeddings.weight" in weights


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = OLD_NAMES if _is_old(weights) else {}
    kept = {name: tensor for name, tensor in weights.items() if name.rsplit(".", 1)[-1] not in TABLES}
    return {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in kept.items()}


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Return the rows (n·K, D) of a projection in the order that turns number i of a head with number i + K/2.

    The old layout turns 2i with 2i + 1. Queries and keys move alike, so their products stay what they were.
    """
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _is_tied(weights: Mapping[str, Tensor]) -> bool:
    return OUTPUT not in weights or EMBEDDING not in weights or torch.equal(weights[OUTPUT], weights[EMBEDDING])


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what holds for a dense model and a mixture of experts alike."""
    vocab_size, hidden_size = weights[EMBEDDING].shape
    layers = {int(match[1]) for match in map(_LAYER.match, weights) if match}
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "use_qk_norm": "model.layers.0.self_attn.q_norm.weight" in weights,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in weights,
        "tie_word_embeddings": _is_tied(weights),
    }


def _experts(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the widths of the feed-forward layers and the number of experts."""
    routers = sorted(int(_LAYER.match(name)[1]) for name in weights if name.endswith(".mlp.gate.weight"))
    first = "model.layers.0.mlp.gate_proj.weight"
    if not routers:
        return {"num_experts": 0, "intermediate_size": weights[first].shape[0]}
    dense = weights.get(first)
    mlp = f"model.layers.{routers[0]}.mlp."
    one = weights.get(mlp + "experts.0.gate_proj.weight")
    width = one.shape[0] if one is not None else weights[mlp + "experts.gate_up_proj"].shape[1] // 2
    told = {
        "num_experts": weights[mlp + "gate.weight"].shape[0],
        "moe_intermediate_size": width,
        "intermediate_size": width if dense is None else dense.shape[0],
        "first_k_dense_replace": routers[0],
    }
    parts = [name for name in weights if re.fullmatch(re.escape(mlp) + _SHARED, name)]
    shared_width = sum(weights[name].shape[0] for name in parts)
    if mlp + "gate.e_score_correction_bias" in weights:
        told |= {"scoring_func": "sigmoid", "n_shared_experts": shared_width // width}
    elif parts:
        n_shared = len(parts) if shared_width % width else shared_width // width
        told |= {"n_shared_experts": n_shared, "shared_expert_intermediate_size": shared_width}
        told["shared_expert_gate"] = mlp + "shared_expert_gate.weight" in weights
    return told


def _heads(
    stored: Mapping[str, Tensor], weights: Mapping[str, Tensor], told: Mapping[str, Any], said: Mapping[str, Any],
    path: str | Path,
) -> dict[str, int]:  # fmt: skip
    """Return the numbers of heads and their width: rows of the projections = heads · width."""
    attention = "model.layers.0.self_attn."
    q_dim, kv_dim = (weights[f"{attention}{name}_proj.weight"].shape[0] for name in "qk")
    tables = [(TABLES.get(name.rsplit(".", 1)[-1]), tensor) for name, tensor in stored.items()]
    widths = [per_column * tensor.shape[-1] for per_column, tensor in tables if per_column]
    if told["use_qk_norm"]:
        widths = [weights[attention + "q_norm.weight"].shape[0]]
    if not widths and said.get("head_dim"):
        widths = [said["head_dim"]]
    if not widths and said.get("num_attention_heads"):
        widths = [q_dim // said["num_attention_heads"]]
    if not widths:
        raise UserError(
            f"{path} does not tell how many heads its {q_dim} query rows are: give num_attention_heads "
            f"(--num_attention_heads 8 for MiniMind), or lay the model's config.json next to it"
        )
    width = widths[0]
    if not width or q_dim % width or kv_dim % width:
        raise UserError(
            f"the weights of {path} do not fit what was said: {q_dim} query rows and {kv_dim} key rows are no whole "
            f"number of heads of width {width}; give another num_attention_heads"
        )
    return {"head_dim": width, "num_attention_heads": q_dim // width, "num_key_value_heads": kv_dim // width}


def _of_release(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the eps of MiniMind 3, if the shapes are its: QK-norm and F = 64·⌈πD/64⌉."""
    is_minimind_3 = told["intermediate_size"] == 64 * math.ceil(told["hidden_size"] * math.pi / 64)
    return {"rms_norm_eps": 1e-6} if told["use_qk_norm"] and is_minimind_3 else {}
