"""Reads plain ``.pth`` state dicts, and infers the model's configuration from the shapes of their tensors.

Three layouts are supported:

- ours, which is Hugging Face's;
- MiniMind's of versions 2 and 3: the same names, in float16, with the tied matrix stored twice;
- LLaMA's own (Touvron et al., 2023; ``layers.0.attention.wq.weight``), also used by llama2.c, MiniMind 1 and the first
  releases of MiniMind 2. In it the two numbers of a rotary pair are neighbours, instead of one in each half of a head.

Such a file has no configuration, except for llama2.c's ``model_args``; our own export writes one next to it. Without
one ``infer_config`` takes what the shapes tell; the caller must give the rest. Nothing is guessed, because wrong heads,
rotary angles or expert weights load without an error and answer nonsense.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Tables that follow from the configuration; some releases store them. Name: dimensions of a head per column.
TABLES = {"freqs_cos": 1, "freqs_sin": 1, "cos_cached": 1, "sin_cached": 1, "inv_freq": 2, "pos_cis": 2, "mask": 0}
NOT_IN_SHAPES = ("num_attention_heads", "head_dim", "rope_theta", "max_position_embeddings", "rms_norm_eps",
                 "bos_token_id", "eos_token_id")  # fmt: skip
# llama2.c's model_args: their names and ours. Its rotary angles are fixed.
MODEL_ARGS = {"n_heads": "num_attention_heads", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
              "max_seq_len": "max_position_embeddings"}  # fmt: skip
MODEL_ARGS_THETA = 1e4
WRAPPERS = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile
LLAMA_NAMES = {
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
    """Return the tensors of the file, including rotary tables, under their own names without wrappers.

    MiniMind's ``_resume.pth`` files hold the weights under ``model``, next to the optimizer.

    Args:
        shapes_only: the caller needs only shapes and few values; the tensors stay in the file if its format allows.

    Raises:
        UserError: the file holds anything other than tensors, for example objects, which would run code when loaded.
    """
    return _read(path, shapes_only)[0]


def _read(path: Path, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, as ``read_pth``, and the settings in the file under our names."""
    settings = {}
    try:
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=shapes_only)
        except RuntimeError:
            if not shapes_only:
                raise
            weights = torch.load(path, map_location="cpu", weights_only=True)  # a file from before torch 1.6
    except Exception as error:  # a damaged file may raise anything; with weights_only none of its code runs
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{path} is not a plain state dict of tensors: {first_line or type(error).__name__}") from error
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        if isinstance(model_args := weights.get("model_args"), dict):
            settings = {MODEL_ARGS[key]: model_args[key] for key in MODEL_ARGS if key in model_args}
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


def load_pth(path: Path, config: ModelConfig, *, shards: Sequence[Path] = ()) -> dict[str, Tensor]:
    """Return the weights of the file under Hugging Face's names, in their stored dtypes, without rotary tables.

    Args:
        shards: the files of weights in several parts, of which ``path`` is the index. Their tensors stay in the files
            until they are read, if their format allows.

    Raises:
        UserError: not a plain state dict; or two different matrices that ``config`` ties.
    """
    stored = {
        name: tensor for file in shards or [path] for name, tensor in read_pth(file, shapes_only=bool(shards)).items()
    }
    weights = _renamed(stored)
    if config.tie_word_embeddings and not _is_tied(weights):
        raise UserError(
            f"{path} has a separate output matrix ({OUTPUT} differs from {EMBEDDING}), but the configuration ties "
            f"them: set tie_word_embeddings to False"
        )
    if _has_llama_names(stored):
        for name, tensor in weights.items():
            has_whole_heads = tensor.ndim == 2 and tensor.shape[0] % config.head_dim == 0  # else it is refused later
            if has_whole_heads and name.endswith(("q_proj.weight", "k_proj.weight")):
                weights[name] = _halves_from_pairs(tensor, config.head_dim)
    if config.model_type == "mixtral":  # MiniMind 2's experts, without shared ones, have other names than Mixtral's
        weights = {_MIXTRAL.sub(_mixtral_name, name): tensor for name, tensor in weights.items()}
    return weights


def config_beside(path: Path) -> Path | None:
    """Return the configuration next to a ``.pth``, ``NAME.config.json`` or ``config.json``; None if there is none."""
    files = (path.with_suffix(".config.json"), path.with_name("config.json"))
    return next((file for file in files if file.is_file()), None)


def infer_config(
    path: str | Path, *, given: Mapping[str, Any] | None = None, fallback: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Return the configuration of the weights in a ``.pth``, inferred from their shapes.

    The shapes tell the sizes of vocabulary, layers and experts, QK-norm, attention bias, tying and the kind of the
    shared experts. They tell the width of a head only with QK-norm or a stored rotary table; otherwise the caller must
    give ``num_attention_heads`` (or ``head_dim``). The caller must always give what shapes never tell:
    ``num_experts_per_tok`` and ``norm_topk_prob`` of a mixture of experts, and ``rope_theta`` of files with LLaMA's own
    names (1e4, 5e5 and 1e6 all occur). These have defaults: ``max_position_embeddings``, ``rope_theta`` of other files
    (1e6) and ``rms_norm_eps`` (1e-5; 1e-6 for the shapes of MiniMind 3).

    Args:
        given: keys of ModelConfig that the caller knows; it is an error if the file contradicts one.
        fallback: values for what neither ``given`` nor the file tells, such as those of a preset. Its
            ``num_attention_heads`` is used only if the names in the file are ours, and its ``hidden_size``, if it has
            one, is that of the weights.

    Raises:
        UserError: not the plain state dict of a complete model; ``given`` contradicts the file or lacks a required key;
            no family has such a mixture of experts.
    """
    stored, settings = _read(Path(path), shapes_only=True)
    weights = _renamed(stored)
    given = {name: value for name, value in (given or {}).items() if value is not None}
    preset = dict(fallback or {})
    if EMBEDDING not in weights or not any(_LAYER.match(name) for name in weights):
        raise UserError(
            f"{path} holds no complete model ({EMBEDDING} or the layers are missing); an adapter needs its base model"
        )
    try:
        inferred = _sizes(weights) | _experts(weights)
        fallback = {name: value for name, value in preset.items() if name in NOT_IN_SHAPES}
        if _has_llama_names(stored) or preset.get("hidden_size", inferred["hidden_size"]) != inferred["hidden_size"]:
            fallback.pop("num_attention_heads", None)  # a wrong number would load and answer nonsense
        fallback |= _minimind_3_eps(inferred) | settings
        inferred |= _heads(stored, weights, inferred, fallback | given, path)
    except UserError:
        raise  # it is a ValueError too
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not the state dict of a supported model: {error} is missing or misshapen") from None
    differences = [
        f"{name} is {inferred[name]} in the file, but {value} was given"
        for name, value in given.items()
        if name in inferred and inferred[name] != value
    ]
    if differences:
        raise UserError(
            f"the weights of {path} contradict what was given: {'; '.join(differences)} (leave out what the file tells)"
        )
    for name, value in settings.items():
        if given.get(name, value) != value:
            raise UserError(f"{path} says itself that {name} is {value}, but {given[name]} was given; leave it out")
    theta_is_known = "rope_theta" in settings | given or not _has_llama_names(stored)
    _check_given(path, given, inferred, theta_is_known=theta_is_known)
    try:
        return ModelConfig(**(fallback | given | inferred))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_given(
    path: str | Path, given: Mapping[str, Any], inferred: Mapping[str, Any], *, theta_is_known: bool
) -> None:
    """Raise UserError unless the caller has given what the file does not tell and the answers depend on."""
    if not theta_is_known:
        raise UserError(
            f"{path} does not tell the angles of its positions: give rope_theta (--rope_theta 10000 for llama2.c, "
            f"LLaMA 1 and 2 and MiniMind 1, 500000 for Llama 3, 1000000 for MiniMind 2)"
        )
    if not inferred["num_experts"]:
        return
    if "num_experts_per_tok" not in given:
        raise UserError(
            f"{path} does not tell the number of experts per token: give num_experts_per_tok "
            f"(--use_moe --num_experts_per_tok 1 for MiniMind 3; usually 2 for MiniMind 2 and our models)"
        )
    if "norm_topk_prob" not in given:
        raise UserError(
            f"{path} does not tell whether the weights of a token's experts are divided by their sum: give "
            f"norm_topk_prob (--norm_topk_prob 1 for most; 0 for MiniMind with one expert per token, if it is version "
            f"2, or version 3 from after 2026-09-17)"
        )


def _mixtral_name(match: re.Match) -> str:
    return f".block_sparse_moe.{match[1]}{MIXTRAL_NAMES[match[2]]}."


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _has_llama_names(weights: Mapping[str, Tensor]) -> bool:
    return "tok_embeddings.weight" in weights


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under Hugging Face's names, without rotary tables."""
    new_names = LLAMA_NAMES if _has_llama_names(weights) else {}
    return {
        ".".join(new_names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in weights.items()
        if name.rsplit(".", 1)[-1] not in TABLES
    }


def _halves_from_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows (n·K, D) of a projection so that RoPE rotates dimension i of a head together with i + K/2.

    LLaMA's layout rotates 2i together with 2i + 1. Queries and keys are reordered alike, so their products are the
    same.
    """
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _is_tied(weights: Mapping[str, Tensor]) -> bool:
    return OUTPUT not in weights or EMBEDDING not in weights or torch.equal(weights[OUTPUT], weights[EMBEDDING])


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keys that dense models and mixtures of experts share."""
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
    dense_gate = "model.layers.0.mlp.gate_proj.weight"
    if not routers:
        return {"num_experts": 0, "intermediate_size": weights[dense_gate].shape[0]}
    mlp = f"model.layers.{routers[0]}.mlp."
    if mlp + "experts.0.gate_proj.weight" in weights:
        width = weights[mlp + "experts.0.gate_proj.weight"].shape[0]
    else:
        width = weights[mlp + "experts.gate_up_proj"].shape[1] // 2
    inferred = {
        "num_experts": weights[mlp + "gate.weight"].shape[0],
        "moe_intermediate_size": width,
        "intermediate_size": weights[dense_gate].shape[0] if dense_gate in weights else width,
        "first_k_dense_replace": routers[0],
    }
    shared_gates = [name for name in weights if re.fullmatch(re.escape(mlp) + _SHARED, name)]
    shared_width = sum(weights[name].shape[0] for name in shared_gates)
    if mlp + "gate.e_score_correction_bias" in weights:
        inferred |= {"scoring_func": "sigmoid", "n_shared_experts": shared_width // width}
    elif shared_gates:
        n_shared = len(shared_gates) if shared_width % width else shared_width // width
        inferred |= {"n_shared_experts": n_shared, "shared_expert_intermediate_size": shared_width}
        inferred["shared_expert_gate"] = mlp + "shared_expert_gate.weight" in weights
    return inferred


def _heads(
    stored: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    inferred: Mapping[str, Any],
    given: Mapping[str, Any],
    path: str | Path,
) -> dict[str, int]:
    """Return the numbers of heads and their width: rows of the projections = heads · width."""
    attention = "model.layers.0.self_attn."
    q_dim, kv_dim = (weights[f"{attention}{name}_proj.weight"].shape[0] for name in "qk")
    tables = [(TABLES.get(name.rsplit(".", 1)[-1]), tensor) for name, tensor in stored.items()]
    widths = [per_column * tensor.shape[-1] for per_column, tensor in tables if per_column]
    if inferred["use_qk_norm"]:
        widths = [weights[attention + "q_norm.weight"].shape[0]]
    if not widths and given.get("head_dim"):
        widths = [given["head_dim"]]
    if not widths and given.get("num_attention_heads"):
        widths = [q_dim // given["num_attention_heads"]]
    if not widths:
        raise UserError(
            f"{path} does not tell how many heads its {q_dim} query rows are: give num_attention_heads "
            f"(--num_attention_heads 8 for MiniMind), or put the model's config.json next to it"
        )
    width = widths[0]
    if not width or q_dim % width or kv_dim % width:
        raise UserError(
            f"the weights of {path} contradict what was given: {q_dim} query rows and {kv_dim} key rows are not "
            f"multiples of a head's width {width}; give another num_attention_heads"
        )
    return {"head_dim": width, "num_attention_heads": q_dim // width, "num_key_value_heads": kv_dim // width}


def _minimind_3_eps(inferred: Mapping[str, Any]) -> dict[str, Any]:
    """Return MiniMind 3's eps if the model has its shapes: QK-norm and F = 64·⌈πD/64⌉."""
    has_width_of_minimind_3 = inferred["intermediate_size"] == 64 * math.ceil(inferred["hidden_size"] * math.pi / 64)
    return {"rms_norm_eps": 1e-6} if inferred["use_qk_norm"] and has_width_of_minimind_3 else {}
