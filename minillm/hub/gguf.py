"""Writes a model as GGUF, the format of llama.cpp and of the programs built on it.

llama.cpp has one graph per architecture. It computes what our families compute, with its own names for settings and
tensors, and with two differences that the file must account for:

* In its ``llama`` graph RoPE turns neighbours, (0, 1), (2, 3), ...; ours, like Hugging Face's, turns number i together
  with i + K/2. Rows of the query and key projections are therefore reordered, head by head; grouped keys have fewer
  heads than queries. Its other graphs turn halves, as ours do, and their rows stay.
* Experts are stacked in one tensor per matrix: gate, up and down.

A setting that a graph does not have is refused, never dropped. The container is in ``gguf_file.py``, the tokenizer in
``gguf_tokenizer.py``.

Legend: D hidden, H query heads, G kv heads, K head width, E experts, F feed-forward width.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub.gguf_file import BLOCK, StoredTensor, Value, write_gguf
from minillm.hub.gguf_tokenizer import tokenizer_settings
from minillm.hub.huggingface import Weights, open_weights
from minillm.model.rope import original_length, rope_frequencies
from minillm.tokenizer import load_tokenizer

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "glm4_moe": "glm4moe",
}  # fmt: skip
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's number for a file that is mostly of a format
SIGMOID = 2  # its number of the router's function
# Our names of a tensor, after "model.layers.N.", and its names after "blk.N.".
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    **{f"self_attn.{x}_proj.{part}": f"attn_{x}.{part}" for x in "qkv" for part in ("weight", "bias")},
    **{f"mlp.{matrix}_proj.weight": f"ffn_{matrix}.weight" for matrix in ("gate", "up", "down")},
    **{
        f"mlp.{shared}.{matrix}_proj.weight": f"ffn_{matrix}_shexp.weight"
        for shared in ("shared_expert", "shared_experts")
        for matrix in ("gate", "up", "down")
    },
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# Small, and rounding decides between experts: always float32, like every vector.
ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def export_gguf(
    model_dir: str | Path,
    path: str | Path,
    *,
    dtype: str = "f16",
    overwrite: bool = False,
    allow_token_differences: bool = False,
) -> list[str]:
    """Write the model in a Hugging Face directory as a GGUF file; return notes about what differs in llama.cpp.

    Tensors are read and written one at a time. The file appears when it is complete.

    Args:
        dtype: of matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. Vectors and routers are float32 in any case.
        overwrite: replace an existing file.
        allow_token_differences: also write a tokenizer that llama.cpp would apply with other ids to some texts; the
            notes say to which.

    Raises:
        UserError: no model or no tokenizer in ``model_dir``, ``path`` exists, an unknown ``dtype``, llama.cpp cannot
            compute this model or tokenizer exactly, numbers that are not finite, or the disk is full.
    """
    model_dir, path = Path(model_dir), Path(path)
    if dtype not in FILE_TYPES:
        raise UserError(f"dtype {dtype!r}: choose one of {', '.join(FILE_TYPES)}")
    if path.is_dir():
        raise UserError(f"{path} is a directory: give the name of a file, such as {path / 'model.gguf'}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another name, or give overwrite (--overwrite)")
    if not (model_dir / "config.json").is_file():
        raise UserError(f"no model at {model_dir}: it has no config.json; give a Hugging Face directory")
    weights = open_weights(model_dir)
    tokenizer = load_tokenizer(model_dir)
    notes: list[str] = []
    settings = model_settings(weights.config, notes, name=model_dir.resolve().name)
    settings |= {"general.file_type": FILE_TYPES[dtype], "general.quantization_version": 2}
    settings |= tokenizer_settings(
        tokenizer, notes, vocab_size=weights.config.vocab_size, allow_differences=allow_token_differences
    )
    tensors = list(stored_tensors(weights, dtype))
    if kept := [tensor.name for tensor in tensors if dtype == "q8_0" and tensor.form == "f16"]:
        notes.append(
            f"{len(kept)} matrices stay f16, because their rows are not multiples of {BLOCK} numbers: "
            f"{', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}"
        )
    write_gguf(path, settings, tensors)
    return notes


# ---- settings --------------------------------------------------------------------------------------


def model_settings(config: ModelConfig, notes: list[str], *, name: str) -> dict[str, Value]:
    """Return llama.cpp's settings of a model; what a user should know is added to ``notes``.

    Raises:
        UserError: llama.cpp's graph of this family lacks a setting.
    """
    _refuse_unsupported(config)
    arch = ARCHITECTURES[config.model_type]
    context = config.max_position_embeddings
    if config.sliding_window and config.sliding_window < context:
        context = config.sliding_window
        notes.append(
            f"llama.cpp's graph has no sliding window: the context is limited to {context} tokens, within which "
            f"results are the same; do not raise it with -c"
        )
    values: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
        **_rope_scaling(config),
        **_experts(config),
    }
    general = {"general.architecture": arch, "general.name": name, "general.alignment": 32}
    return general | {f"{arch}.{key}": value for key, value in values.items()}


def _rope_scaling(config: ModelConfig) -> dict[str, Value]:
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind in ("default", "llama3"):  # llama3: see rope_factors
        return {"rope.scaling.type": "none"}
    values: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        _, attention_factor = rope_frequencies(torch.zeros(1, 1), config, dtype=torch.float64)
        usual_factor = 1 + 0.1 * math.log(scaling["factor"])
        values["rope.scaling.original_context_length"] = original_length(config)
        values["rope.scaling.attn_factor"] = float(attention_factor / usual_factor)  # llama.cpp multiplies by the usual
    return values


def _experts(config: ModelConfig) -> dict[str, Value]:
    if not config.num_experts:
        return {}
    values: dict[str, Value] = {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }
    if config.model_type == "qwen2_moe":
        values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if config.model_type == "glm4_moe":
        values |= {
            "expert_shared_count": config.n_shared_experts,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_gating_func": SIGMOID,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": float(config.routed_scaling_factor),
        }
        if config.topk_group < config.n_group:
            values |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return values


def _refuse_unsupported(config: ModelConfig) -> None:
    """Raise UserError for what llama.cpp's graph of the family does not compute."""
    family, scaling = config.model_type, config.rope_scaling or {}
    kind = scaling.get("rope_type")
    yarn_bounds = (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1, scaling.get("truncate", True))
    n_dense = config.num_hidden_layers - config.n_sparse_layers
    reasons = {
        "it has no dynamic RoPE scaling (choose yarn or linear)": kind == "dynamic",
        "its graph of this family has no llama3 RoPE scaling": kind == "llama3" and ARCHITECTURES[family] != "llama",
        "its yarn has fixed bounds (beta_fast 32, beta_slow 1, whole numbers)": kind == "yarn"
        and yarn_bounds != (32, 1, True),
        "its heads must be hidden_size / num_attention_heads wide": family in ("qwen2", "qwen2_moe")
        and config.head_dim * config.num_attention_heads != config.hidden_size,
        "all of its layers have experts": family in ("qwen2_moe", "qwen3_moe") and n_dense > 0,
        "it never divides the experts' weights by their sum (norm_topk_prob is true)": family == "qwen2_moe"
        and config.norm_topk_prob,
        "it always divides the experts' weights by their sum (norm_topk_prob is false)": family
        in ("mixtral", "qwen3_moe")
        and not config.norm_topk_prob,
        "its shared expert needs a gate, and a gate of zeros is 0/0 there": family == "qwen2_moe"
        and not config.shared_expert_gate,
    }  # fmt: skip
    if problems := [reason for reason, is_so in reasons.items() if is_so]:
        raise UserError(f"llama.cpp cannot run this {family} model exactly: {'; '.join(problems)}")


# ---- tensors ---------------------------------------------------------------------------------------


def stored_tensors(weights: Weights, dtype: str) -> Iterator[StoredTensor]:
    """Yield the tensors of the file, in order."""
    config = weights.config
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        factors = rope_factors(config)
        yield StoredTensor("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)
    for name, shape in weights.shapes.items():
        if name.endswith("experts.gate_up_proj"):  # (E, 2F, D) is two tensors (E, F, D)
            block = _block(name)
            n_experts, width, dim = shape[0], shape[1] // 2, shape[2]
            for matrix, rows in (("gate", slice(0, width)), ("up", slice(width, None))):

                def read_half(name=name, rows=rows):
                    return weights.read(name)[:, rows]

                new_name = f"{block}.ffn_{matrix}_exps.weight"
                new_shape = (n_experts, width, dim)
                yield StoredTensor(new_name, new_shape, _form(new_name, new_shape, dtype), read_half)
            continue
        new_name = gguf_name(name, config)
        new_shape = tuple(shape) if not new_name.endswith("gate_inp_shexp.weight") else (shape[1],)

        def read(name=name, new_shape=new_shape):
            return _reordered(name, weights.read(name), config).reshape(new_shape)

        yield StoredTensor(new_name, new_shape, _form(new_name, new_shape, dtype), read)
    if config.tie_word_embeddings and config.model_type == "qwen2_moe":  # this graph cannot share the matrix
        name, shape = "model.embed_tokens.weight", tuple(weights.shapes["model.embed_tokens.weight"])
        yield StoredTensor("output.weight", shape, _form("output.weight", shape, dtype), lambda: weights.read(name))


def gguf_name(name: str, config: ModelConfig) -> str:
    """Return llama.cpp's name of a parameter or buffer."""
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    part = name.split(".", 3)[3]
    if config.model_type == "glm4_moe" and part == "post_attention_layernorm.weight":
        return f"{_block(name)}.post_attention_norm.weight"
    return f"{_block(name)}.{LAYER_NAMES[part]}"


def _block(name: str) -> str:
    return f"blk.{name.split('.')[2]}"


def _form(name: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1 or name.endswith(ALWAYS_FLOAT32):
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % BLOCK else dtype


def _reordered(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a tensor with its rows in the order of llama.cpp's graph."""
    if (
        ARCHITECTURES[config.model_type] == "llama"
        and ".self_attn." in name
        and name.split(".")[4] in ("q_proj", "k_proj")
    ):
        return pairs_from_halves(tensor, config.head_dim)
    return tensor


def pairs_from_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows (n·K, ...) of a projection, head by head, so that rows i and i + K/2 become neighbours.

    The number of heads follows from the rows: it is H for queries and G for keys.
    """
    heads = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])  # (heads, halves, K/2, ...)
    return heads.transpose(1, 2).reshape(weight.shape)


def rope_factors(config: ModelConfig) -> Tensor:
    """Return the numbers (K/2,) by which llama.cpp divides the frequencies of RoPE: those of llama3's scaling."""
    scaled, _ = rope_frequencies(torch.zeros(1, 1), config, dtype=torch.float64)
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    return (config.rope_theta**-exponents / scaled).float()
