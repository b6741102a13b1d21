"""Grouped-query attention with rotary positions, causal and within documents.

Vaswani et al., Attention Is All You Need (2017), section 3.2; Ainslie et al., GQA (2023), section 2.2;
QK-norm: Henry et al., Query-Key Normalization (2020), in the form of Qwen3 (RMSNorm per head). Sliding window: Jiang
et al., Mistral 7B (2023), section 2.

Legend: B batch, T positions, S key positions, D hidden, H query heads, G kv heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.kernels.block_attention import Blocks, block_attention
from minillm.model.kv_cache import KVCache
from minillm.model.norm import RMSNorm
from minillm.model.rope import apply_rope

SHARES_HEADS_ON_MPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def window_mask(seq_len: int, window: int, *, device: torch.device) -> Tensor:
    """Return (1, 1, T, T), true where query t may look at key s: t − window < s ≤ t, ``window`` keys with itself."""
    index = torch.arange(seq_len, device=device)
    distance = index[:, None] - index  # (T, T)
    return ((distance >= 0) & (distance < window))[None, None]


def document_mask(document_ids: Tensor, window: int | None = None) -> Tensor:
    """Return (B, 1, T, T), true where query t may look at key s: s ≤ t, in the same document, in the window if any.

    Documents of a packed row never see each other. Padding (−1) sees only itself: a query that may look
    nowhere would make the softmax 0 / 0.
    """
    seq_len = document_ids.shape[1]
    same = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    same &= (document_ids >= 0)[:, :, None]
    itself = torch.eye(seq_len, dtype=torch.bool, device=document_ids.device)  # (T, T)
    mask = (same.tril() | itself)[:, None]  # (B, 1, T, T)
    if window is not None and window < seq_len:
        mask &= window_mask(seq_len, window, device=mask.device)
    return mask


def document_positions(document_ids: Tensor) -> Tensor:
    """Return (B, T): the position of each token in its own document, from 0; documents are contiguous runs."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)  # (B, T)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    # The last start up to each token: a running maximum, which Apple's GPUs have had for a short time only. So it is
    # taken from the numbers of the documents, whose starts are one each.
    document = starts.long().cumsum(dim=1) - 1  # (B, T)
    first = torch.zeros_like(index).scatter_add(1, document, torch.where(starts, index, 0))  # (B, T), by document
    return index - first.gather(1, document)


def needs_equal_heads(device: str, *, masked: bool) -> bool:
    """Return whether key heads must be repeated for torch's attention, rather than shared by it.

    With a mask, CUDA's fast kernels take no shared heads and would fall back to the slow one. On Apple's GPUs torch
    before 2.11 reads past the end of shared heads of 1,024 keys and more, and computes with what it finds there.
    """
    return (masked and device == "cuda") or (device == "mps" and not SHARES_HEADS_ON_MPS)


class Attention(nn.Module):
    """Self-attention: (B, T, D) → (B, T, D)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.n_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)
        if config.use_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | Blocks | None, cache: KVCache | None
    ) -> Tensor:
        n_rows, seq_len, _ = x.shape
        per_head = (n_rows, seq_len, -1, self.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).view(per_head)), *rope).transpose(1, 2)  # (B, H, T, K)
        k = apply_rope(self.k_norm(self.k_proj(x).view(per_head)), *rope).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(per_head).transpose(1, 2)  # (B, G, T, K)
        if cache is not None:
            k, v = cache.store(self.layer, k, v)  # (B, G, S, K)
        if self.n_groups > 1 and needs_equal_heads(q.device.type, masked=isinstance(mask, Tensor)):
            k, v = (t.repeat_interleave(self.n_groups, dim=1) for t in (k, v))  # (B, H, S, K)
        if isinstance(mask, Blocks):
            mixed = block_attention(q, k, v, mask)  # (B, H, T, K)
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and cache is None, enable_gqa=k.shape[1] != q.shape[1]
            )  # (B, H, T, K)
        return self.o_proj(mixed.transpose(1, 2).reshape(n_rows, seq_len, -1))  # (B, T, D)
