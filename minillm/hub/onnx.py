"""Exports a model to ONNX, with the cache of keys and values as inputs and outputs.

Names and shapes are those of optimum, so that programs for its exports can run it:

    input_ids                (B, T)        int64
    attention_mask           (B, P + T)    int64, 0 where padding (on the left), for past and new tokens together
    position_ids             (B, T)        int64, a token's place in its row without padding
    past_key_values.N.key    (B, G, P, K)  float32, and .value; P is 0 for the first call
    → logits                 (B, T, V)     float32
    → present.N.key          (B, G, P + T, K), and .value: the past of the next call

B, T and P may differ from call to call. The graph contains the modules of the model; only attention is written again,
because our cache is an object and here it is tensors. A mixture of experts would compute every expert for every token:
it is refused.

Legend: B batch, T new positions, P past positions, S = P + T, H query heads, G kv heads, K head width, V vocabulary.
"""

import contextlib
import io
import logging
import os
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.errors import UserError, missing_package
from minillm.model.rope import apply_rope, rope_tables
from minillm.model.transformer import Transformer

OPSET = 18
LARGEST = 2**31  # bytes of a file; larger weights go to a second file


class WithCacheTensors(nn.Module):
    """A model whose past is two tensors per layer; forward takes and returns what the head of this file lists."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        model, config = self.model.model, self.model.config
        x = model.embed_tokens(input_ids)  # (B, T, D)
        rope = rope_tables(position_ids, config, dtype=x.dtype)
        mask = _visible(attention_mask, input_ids.shape[1], config.sliding_window)  # (B, 1, T, S)
        present = []
        for block, (past_keys, past_values) in zip(model.layers, past, strict=True):
            attention, normed = block.self_attn, block.input_layernorm(x)
            per_head = (*input_ids.shape, -1, config.head_dim)
            q = apply_rope(attention.q_norm(attention.q_proj(normed).view(per_head)), *rope).transpose(1, 2)
            k = apply_rope(attention.k_norm(attention.k_proj(normed).view(per_head)), *rope).transpose(1, 2)
            v = attention.v_proj(normed).view(per_head).transpose(1, 2)  # (B, G, T, K)
            keys, values = torch.cat([past_keys, k], dim=2), torch.cat([past_values, v], dim=2)  # (B, G, S, K)
            present.append((keys, values))
            x = x + attention.o_proj(_attend(q, keys, values, mask))
            x = x + block.mlp(block.post_attention_layernorm(x))  # (B, T, D)
        return self.model.lm_head(model.norm(x)), present


def _visible(attention_mask: Tensor, n_new: int, window: int | None) -> Tensor:
    """Return (B, 1, T, S), true where a new token may look: not ahead, not at padding, not beyond the window."""
    slots = torch.arange(attention_mask.shape[1], device=attention_mask.device)  # (S,)
    queries = slots[-n_new:, None]  # (T, 1): the new tokens are last
    seen = slots <= queries  # (T, S)
    if window is not None:
        seen = seen & (slots > queries - window)
    return seen & (attention_mask[:, None, None, :] != 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return softmax(q·kᵀ/√K)·v as (B, T, H·K). A query that sees nothing (padding) gets numbers without meaning."""
    n_groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(n_groups, dim=1), v.repeat_interleave(n_groups, dim=1)  # (B, H, S, K)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # (B, H, T, S)
    weights = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def export_onnx(model: Transformer, path: str | Path, *, overwrite: bool = False) -> None:
    """Write ``model`` as an ONNX file in float32. Weights of more than 2 GB go to a second file, ``<name>.data``.

    Raises:
        UserError: the packages are missing, ``path`` exists, the model is a mixture of experts, has an adapter that is
            not merged, or has numbers that are not finite; or the disk is full.
    """
    path = Path(path)
    if model.config.num_experts:
        raise UserError(
            f"{model.config.model_type} is a mixture of experts: an ONNX graph would compute all "
            f"{model.config.num_experts} experts for every token; export it as GGUF (--format gguf)"
        )
    if any(".lora." in name for name, _ in model.named_parameters()):
        raise UserError("the model has an adapter: call merge_lora(model, keep_base=False) first")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another name, or give overwrite (--overwrite)")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"{name} has numbers that are not finite: nothing was written; use older weights")
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter uses it
    except ImportError as error:
        raise missing_package(error.name or "onnx", purpose="exporting to ONNX", extra="export") from None
    program = _program(model.float().cpu().eval())
    is_large = sum(p.numel() for p in model.parameters()) * 4 > LARGEST // 2
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as directory:
            temporary = Path(directory) / path.name
            program.save(str(temporary), external_data=is_large)
            onnx.checker.check_model(str(temporary))
            for file in sorted(Path(directory).iterdir(), key=lambda file: file == temporary):  # the graph comes last
                os.replace(file, path.parent / file.name)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was left there") from error


@torch.no_grad()
def _program(model: Transformer):
    """Return torch's ONNX program of the model. The sizes of the example mean nothing, but none of them is 0 or 1."""
    config, (n_rows, n_new, n_past) = model.config, (2, 3, 4)
    past_shape = (n_rows, config.num_key_value_heads, n_past, config.head_dim)
    past = [(torch.zeros(past_shape), torch.zeros(past_shape)) for _ in range(config.num_hidden_layers)]
    inputs = (
        torch.zeros(n_rows, n_new, dtype=torch.long),
        torch.ones(n_rows, n_past + n_new, dtype=torch.long),
        torch.arange(n_past, n_past + n_new).expand(n_rows, -1).contiguous(),
        past,
    )
    dynamic = torch.export.Dim.DYNAMIC
    cache = {0: dynamic, 2: dynamic}
    shapes = (*[{0: dynamic, 1: dynamic}] * 3, [(cache, cache)] * config.num_hidden_layers)
    layers = range(config.num_hidden_layers)
    kinds = ("key", "value")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        return torch.onnx.export(
            WithCacheTensors(model),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids"]
            + [f"past_key_values.{layer}.{kind}" for layer in layers for kind in kinds],
            output_names=["logits", *(f"present.{layer}.{kind}" for layer in layers for kind in kinds)],
            verbose=False,
        )
