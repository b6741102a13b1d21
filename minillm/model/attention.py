"""Grouped-query attention with rotary positions, causal and within documents.

Vaswani et al., Attention Is All You Need (2017), section 3.2; Ainslie et al., GQA (2023), section 2.2;
QK-norm: Henry et al., Query-Key Normalization (2020), in the form of Qwen3 (RMSNorm per head). Sliding window: Jiang
et al., Mistral 7B (2023), section 2.

Legend: B batch, T positions, S key positions, D hidden, H query heads, G kv heads, K head width.
"""

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model.attention_plan import AttentionPlan, attend
from minillm.model.kv_cache import KVCache
from minillm.model.norm import RMSNorm
from minillm.model.rope import apply_rope


class Attention(nn.Module):
    """Self-attention: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], plan: AttentionPlan, cache: KVCache | None) -> Tensor:
        n_rows, seq_len, _ = x.shape
        per_head = (n_rows, seq_len, -1, self.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).view(per_head)), *rope).transpose(1, 2)  # (B, H, T, K)
        k = apply_rope(self.k_norm(self.k_proj(x).view(per_head)), *rope).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(per_head).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.store(self.layer, k, v)  # (B, G, S, K)
        mixed = attend(q, k, v, plan)  # (B, H, T, K)
        return self.o_proj(mixed.transpose(1, 2).reshape(n_rows, seq_len, -1))  # (B, T, D)
