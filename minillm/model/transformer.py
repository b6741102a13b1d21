"""The decoder-only transformer: embedding, blocks, final norm, output layer.

Pre-norm residual blocks as in Touvron et al., LLaMA (2023), section 2.2. Parameter names are Hugging Face's.

Legend: B batch, T positions, D hidden, V vocabulary.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.config import ModelConfig
from minillm.model.attention import Attention
from minillm.model.attention_plan import AttentionPlan, document_positions, plan_attention
from minillm.model.kv_cache import KVCache
from minillm.model.mlp import MLP
from minillm.model.moe import MoE, Routing
from minillm.model.norm import RMSNorm
from minillm.model.rope import rope_tables
from minillm.model.router_stats import RouterStats


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised copy of the stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layer) if config.has_experts(layer) else MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        cache: KVCache | None,
        routing: Routing,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, plan, cache)
        return x + self.mlp(self.post_attention_layernorm(x), routing)  # (B, T, D)


class Decoder(nn.Module):
    """Everything below the output layer: token ids (B, T) → hidden states (B, T, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        rope: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        cache: KVCache | None,
        routing: Routing,
        recompute: bool,
    ) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, T, D)
        for block in self.layers:
            if recompute:
                # Only the block's input is kept. The generators' state is kept too: dropout must draw the
                # same mask in the recomputation, or the gradients belong to another network.
                x = checkpoint(block, x, rope, plan, cache, routing, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, rope, plan, cache, routing)
        return self.norm(x)


class Transformer(nn.Module):
    """A causal language model with Hugging Face's parameter names (``model.layers.0.self_attn.q_proj.weight``).

    Weights are drawn from N(0, initializer_range²); the two projections of a block that write into the residual
    stream are scaled by 1/sqrt(2 · layers), so that the stream's variance does not grow with depth (Radford et
    al., GPT-2, 2019, section 2.3).

    Attributes:
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        block_attention: train on a CPU with our own attention, which beats torch's there (``block_attention.py``).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.generation_config: dict = {}  # of the directory it was read from; ``save_model`` writes it back
        self.block_attention = True
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Make the output layer use the embedding matrix, if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's generator."""
        std = self.config.initializer_range
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():  # a tied matrix occurs once
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # else the scales of the norms
            else:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
                nn.init.normal_(parameter, std=residual_std if residual else std)
        for buffer in self.buffers():  # the correction biases of the routers
            buffer.zero_()

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_bounds: Tensor | None = None,
        cache: KVCache | None = None,
        head: Callable[[Tensor, Tensor | None], Any] | None = None,
        router_stats: RouterStats | None = None,
    ) -> Any:
        """Return logits (B, T, V), or what ``head(hidden, output_weight)`` returns.

        Args:
            input_ids: (B, T).
            position_ids: (B, T); default: from 0 per row, or per document, or after what the cache holds.
            document_ids: (B, T), equal numbers for one document, −1 for padding; without them each row is
                one document. With a cache they only mark padding, which stands on the right.
            document_bounds: (n + 1,) int32, where each run of equal ``document_ids`` begins in the flattened batch, and
                its end (``minillm.data.batches.document_bounds``): on a GPU attention then needs no mask. Optional.
            cache: filled and advanced by the new tokens; a ``KVCache``, or an engine's ``PagedCache``.
            head: takes the hidden states (B, T, D) and the output weight (V, D), or logits (B, T, V) and None where
                the output layer has an adapter. A loss given so runs inside this forward, where DDP, FSDP and ZeRO
                see its use of the weight.
            router_stats: collects what the routers of a mixture of experts do; a dense model leaves it untouched.
        """
        weight = self.model.embed_tokens.weight
        if cache is not None:
            cache.begin(input_ids.shape[1], document_ids)
        plan = plan_attention(
            input_ids,
            document_ids=document_ids,
            document_bounds=document_bounds,
            cache=cache,
            window=self.config.sliding_window,
            head_dim=self.config.head_dim,
            weight=weight,
            # Also under no_grad: a frozen reference must give the same bits as the policy, so both take one kernel.
            in_blocks=self.block_attention and self.training,
            is_frozen=not self.model.layers[0].self_attn.q_proj.weight.requires_grad,
        )
        if position_ids is None:
            position_ids = self._positions(input_ids, document_ids, cache)
        rope = rope_tables(position_ids, self.config, dtype=weight.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        routing = Routing(None if document_ids is None else document_ids >= 0, router_stats)
        hidden = self.model(input_ids, rope, plan, cache, routing, recompute)
        if cache is not None:
            cache.end()
        if head is not None:
            return head(hidden, self.lm_head.weight) if self._head_is_plain() else head(self.lm_head(hidden), None)
        return self.lm_head(hidden)

    def _positions(self, input_ids: Tensor, document_ids: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return (B or 1, T): from 0 in each row or document, or after what the cache holds."""
        if cache is not None:
            return cache.position_ids
        if document_ids is not None:
            return document_positions(document_ids)
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    def _head_is_plain(self) -> bool:
        """Return whether the output layer is its weight alone, so that the logits need not exist as a whole.

        Not with an adapter or in another form (int8), nor where someone has replaced its ``forward``: a hook that, say,
        fetches the weight from the CPU must be run. That is not of this library's making, so what it costs is worth a
        word.
        """
        if "lora" in self.lm_head._modules or not isinstance(self.lm_head, nn.Linear):
            return False
        if "forward" not in vars(self.lm_head):
            return True
        warnings.warn(
            "the output layer's forward was replaced (by a hook?): all logits are held at once, which takes positions "
            "x vocabulary x 4 bytes and more; remove the hook to train by chunks",
            stacklevel=3,
        )
        return False
