"""Attention of packed documents on a GPU: the plain expression, and torch's flash attention for documents end to end.

A masked kernel computes every pair of a row and throws most of them away; short documents in long rows have few pairs
of their own. Here the rows of a batch are one long sequence, the kernel is told where each document begins, and no mask
exists. A stretch of padding counts as a document: nothing reads what is computed there.

Dao, FlashAttention-2 (2023), section 3.

Legend: B batch, T positions, H query heads, G kv heads, K head width, n documents of the whole batch.
"""

import functools
import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Documents(NamedTuple):
    """Where the documents of a batch lie in its flattened rows (B·T), the same for all layers."""

    bounds: Tensor  # (n + 1,) int32: where each begins, and the end of the last
    max_len: int  # no document is longer; the length of a row is known without asking the device
    window: int | None = None  # keys that a query may look back at, itself included; None: all


def is_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's kernel can take queries of this kind."""
    is_taken = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    return is_taken and head_dim % 8 == 0 and head_dim <= 192 and _torch_has_it() and _device_has_it(device)


@functools.cache
def _torch_has_it() -> bool:
    """Return whether this torch has the kernel with windows and shared heads (2.10 had neither)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


@functools.cache
def _device_has_it(device: torch.device) -> bool:
    """Return whether this is an NVIDIA card of the Ampere generation or a newer one."""
    has_flash = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return has_flash and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K)) v within each document, each query seeing the keys up to its own position.

    Args:
        q: (B, H, T, K). k, v: (B, G, T, K); each kv head serves H / G neighbouring query heads.

    Returns:
        (B, H, T, K).
    """
    from torch.nn.attention.varlen import varlen_attn  # takes a second, which nobody else should wait for

    n_rows, n_heads, seq_len, head_dim = q.shape
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]  # (B·T, H or G, K), views of what the layer made
    bounds, max_len, window = documents
    # The kernel counts the keys before the query, without itself. −1: all of them, which it knows as causal.
    before = -1 if window is None or window >= max_len else window - 1
    out = varlen_attn(
        *flat, bounds, bounds, max_len, max_len, window_size=(before, 0), enable_gqa=k.shape[1] != n_heads
    )
    return out.view(n_rows, seq_len, n_heads, head_dim).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Return the same with a mask over the whole batch, as autograd would have it."""
    n_rows, n_heads, seq_len, _ = q.shape
    q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v))  # (1, H or G, B·T, K)
    index = torch.arange(n_rows * seq_len, device=q.device)
    document = torch.searchsorted(documents.bounds, index, right=True)  # (B·T,)
    distance = index[:, None] - index  # (B·T, B·T)
    mask = (document[:, None] == document) & (distance >= 0)
    if documents.window is not None:
        mask &= distance < documents.window
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != n_heads)
    return out[0].unflatten(1, (n_rows, seq_len)).transpose(0, 1)
