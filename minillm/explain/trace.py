"""One forward pass, watched: what each part of the model receives, gives back and costs.

Hooks look at the model and change nothing; only the attention's probabilities, which no fast kernel ever holds, are
computed once more next to it.

Legend: T tokens, D hidden, H query heads, V vocabulary, E experts, k experts per token.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minillm.model import Transformer, attention
from minillm.model.moe import MoE, Router

N_CANDIDATES = 10


@dataclass(kw_only=True)
class Part:
    """One part of the model, as the tokens went through it.

    Attributes:
        name: that of Hugging Face, such as ``model.layers.0.self_attn``.
        kind: embedding, attention, feed-forward, experts, norm or output.
        shapes: of what came in and of what went out.
        n_parameters, n_bytes: of its weights. n_active: parameters that one token uses.
        flops: multiplications and additions for all T tokens.
        seconds: wall-clock time.
        stream_norms: (T,), the length of each token's vector in the stream after this part; None for the output.
        probabilities: (H, T, T) of attention: how much each token (row) takes from each token (column).
        experts: (T, k), the experts that the router chose for each token.
        guess: the token that the model would say if it ended here, and its probability (after a block).
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    n_parameters: int
    n_active: int
    n_bytes: int
    flops: float
    seconds: float
    stream_norms: Tensor | None = None
    probabilities: Tensor | None = None
    experts: Tensor | None = None
    guess: tuple[int, float] | None = None


@dataclass(kw_only=True)
class Trace:
    """A prompt's way through a model."""

    ids: list[int]
    parts: list[Part] = field(default_factory=list)
    candidates: list[tuple[int, float]] = field(default_factory=list)
    """The most probable next tokens with their probabilities."""
    entropy: float = 0.0
    """Of the next token's distribution, in nats."""

    def total(self, what: str) -> float:
        """Return the sum of a figure over all parts."""
        return sum(getattr(part, what) for part in self.parts)


@torch.no_grad()
def trace(model: Transformer, ids: Sequence[int]) -> Trace:
    """Return what happens when ``model`` reads ``ids``, in evaluation mode."""
    found, was_training = Trace(ids=list(ids)), model.training
    device = model.model.embed_tokens.weight.device
    model.eval()
    try:
        tokens = torch.tensor([list(ids)], device=device)
        with _watched(model, found):
            logits = model(tokens)[0, -1].float()  # (V,)
        with _recorded_attention(found):  # apart, since it takes longer than what is timed
            model(tokens)
    finally:
        model.train(was_training)
    if model.config.tie_word_embeddings:
        found.parts[-1].n_parameters = found.parts[-1].n_bytes = 0  # they are the embedding's, counted there
    probabilities = logits.softmax(dim=-1)
    top = probabilities.topk(min(N_CANDIDATES, len(probabilities)))
    found.candidates = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    found.entropy = float(torch.special.entr(probabilities).sum())
    return found


@contextlib.contextmanager
def _watched(model: Transformer, found: Trace) -> Iterator[None]:
    """Inside, each part of the model that runs is added to ``found``."""
    handles, began = [], {}

    def watch(name: str, kind: str) -> None:
        module = model.get_submodule(name)

        def before(module: nn.Module, inputs: tuple) -> None:
            began[name] = time.perf_counter()

        def after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seconds = time.perf_counter() - began[name]
            found.parts.append(_part(model, name, kind, module, tuple(inputs[0].shape), output, seconds))

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    def stream_after(module: nn.Module, inputs: tuple) -> None:  # before the second norm: the attention is added
        found.parts[-1].stream_norms = _lengths(inputs[0])

    def block_after(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        found.parts[-1].stream_norms = _lengths(output)
        last = model.lm_head.forward(model.model.norm.forward(output[:, -1]))[0].float().softmax(dim=-1)  # (V,)
        found.parts[-1].guess = int(last.argmax()), float(last.max())

    def experts_after(module: nn.Module, inputs: tuple, output: tuple) -> None:
        chosen.append(output[2])

    chosen: list[Tensor] = []
    watch("model.embed_tokens", "embedding")
    for layer, block in enumerate(model.model.layers):
        watch(f"model.layers.{layer}.self_attn", "attention")
        handles.append(block.post_attention_layernorm.register_forward_pre_hook(stream_after))
        is_sparse = isinstance(block.mlp, MoE)
        watch(f"model.layers.{layer}.mlp", "experts" if is_sparse else "feed-forward")
        handles.append(block.register_forward_hook(block_after))
        routers = [module for module in block.mlp.modules() if isinstance(module, Router)]
        handles.extend(router.register_forward_hook(experts_after) for router in routers)
    watch("model.norm", "norm")
    watch("lm_head", "output")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    sparse = [part for part in found.parts if part.kind == "experts"]
    for part, experts in zip(sparse, chosen, strict=True):
        part.experts = experts.reshape(len(found.ids), -1)


@contextlib.contextmanager
def _recorded_attention(found: Trace) -> Iterator[None]:
    """Inside, the probabilities of each layer's attention are kept in its part."""
    computed: list[Tensor] = []
    attend = attention.attend

    def recorded(q: Tensor, k: Tensor, v: Tensor, plan: attention.AttentionPlan) -> Tensor:
        computed.append(_probabilities(q, k, plan))
        return attend(q, k, v, plan)

    attention.attend = recorded
    try:
        yield
    finally:
        attention.attend = attend
    layers = [part for part in found.parts if part.kind == "attention"]
    for part, probabilities in zip(layers, computed, strict=True):
        part.probabilities = probabilities.cpu()


def _probabilities(q: Tensor, k: Tensor, plan: attention.AttentionPlan) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K)) over the keys that each query sees, (H, T, T) float32."""
    n_tokens, n_heads = q.shape[2], q.shape[1]
    keys = k[0].repeat_interleave(n_heads // k.shape[1], dim=0).float()  # (H, T, K)
    scores = q[0].float() @ keys.transpose(1, 2) / q.shape[-1] ** 0.5
    if plan.mask is not None and plan.mask.dtype == torch.bool:
        is_seen = plan.mask[0, 0]
    elif plan.mask is not None:
        is_seen = plan.mask[0, 0] > float("-inf")
    else:
        is_seen = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~is_seen, float("-inf")).softmax(dim=-1)


def _part(
    model: Transformer, name: str, kind: str, module: nn.Module, came: tuple, output: Tensor, seconds: float
) -> Part:
    parameters = list(module.parameters())
    n_parameters = sum(p.numel() for p in parameters)
    config, n_active = model.config, n_parameters
    if kind == "experts":
        n_active -= (
            (config.num_experts - config.num_experts_per_tok) * 3 * config.hidden_size * config.moe_intermediate_size
        )
    n_tokens = came[1]
    n_pairs = n_tokens * (n_tokens + 1) // 2
    if config.sliding_window is not None:
        n_pairs = sum(min(position + 1, config.sliding_window) for position in range(n_tokens))
    flops = {
        "embedding": 0,  # looked up
        "attention": 2 * n_tokens * n_active + 4 * config.num_attention_heads * config.head_dim * n_pairs,
        "norm": 4 * n_tokens * config.hidden_size,
    }.get(kind, 2 * n_tokens * n_active)
    return Part(
        name=name,
        kind=kind,
        shapes=(came, tuple(output.shape)),
        n_parameters=n_parameters,
        n_active=n_active,
        n_bytes=sum(p.numel() * p.element_size() for p in parameters),
        flops=flops,
        seconds=seconds,
        stream_norms=_lengths(output) if kind in ("embedding", "norm") else None,
    )


def _lengths(stream: Tensor) -> Tensor:
    """Return the length of each token's vector, (T,), of (1, T, D)."""
    return stream[0].float().norm(dim=-1).cpu()
