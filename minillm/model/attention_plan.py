"""Who may look at whom in one forward pass, and which implementation computes it: one decision for all layers.

Nothing else in the model looks at devices, at the training mode or at what is frozen.

Legend: B batch, T positions, S key positions, H query heads, G kv heads, J = H / G, K head width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.kernels import varlen_attention
from minillm.kernels.block_attention import MAX_SEQ_LEN, Blocks, block_attention, plan_blocks
from minillm.kernels.paged_attention import PageGroup, paged_attention
from minillm.kernels.varlen_attention import Documents
from minillm.model.kv_cache import KVCache

SHARES_HEADS_ON_MPS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


class AttentionPlan(NamedTuple):
    """What ``attend`` does with queries, keys and values.

    Attributes:
        mask: (B or 1, 1, T, S), true where a query may look at a key; or numbers to add to the scores.
        is_causal: without a mask: each query sees the keys up to its own position. Neither: it sees all of them.
        blocks: instead of both: the tiles of our own attention for training on a CPU (``kernels/block_attention.py``).
        documents: instead of all: where the documents lie, for a GPU (``kernels/varlen_attention.py``).
        page_groups: instead of all: where the requests of an engine keep their keys (``kernels/paged_attention.py``).
    """

    mask: Tensor | None = None
    is_causal: bool = False
    blocks: Blocks | None = None
    documents: Documents | None = None
    page_groups: list[PageGroup] | None = None


def plan_attention(
    input_ids: Tensor,
    *,
    document_ids: Tensor | None,
    document_bounds: Tensor | None = None,
    cache: KVCache | None,
    window: int | None,
    head_dim: int,
    weight: Tensor,
    in_blocks: bool,
    is_frozen: bool,
) -> AttentionPlan:
    """Return the plan of one forward pass.

    Args:
        input_ids: (B, T). document_ids, document_bounds: as in ``Transformer.forward``.
        cache: one whose ``begin`` has been called: it knows which of its slots each query may see.
        window: keys that a query may look back at, itself included; None: all. head_dim: K.
        weight: one of the model, for its dtype.
        in_blocks: train on a CPU with our own attention, which beats torch's there.
        is_frozen: an adapter is trained on frozen weights, so memory counts: probabilities are computed twice.
    """
    if cache is not None:
        return AttentionPlan(mask=cache.mask, is_causal=cache.is_causal, page_groups=cache.page_groups)
    seq_len, device = input_ids.shape[1], input_ids.device
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype  # of queries and keys
    if document_bounds is not None and seq_len > 1 and varlen_attention.is_available(device, dtype, head_dim):
        return AttentionPlan(documents=Documents(document_bounds, seq_len, window))
    mask = None
    if document_ids is not None:
        mask = document_mask(document_ids, window)
    elif window is not None and window < seq_len:
        mask = window_mask(seq_len, window, device=device)
    # Planning tiles reads numbers out of the mask: not possible while compiling or exporting, or for meta tensors.
    has_data = not torch.compiler.is_compiling() and type(input_ids) is Tensor
    if in_blocks and has_data and device.type == "cpu" and 1 < seq_len <= MAX_SEQ_LEN:
        blocks = plan_blocks(mask, input_ids.shape, dtype=dtype, device=device, keep=not is_frozen)
        return AttentionPlan(blocks=blocks)
    if mask is not None and device.type == "cuda":
        # The kernel adds a float mask; it would convert a bool mask in every layer, and keep each copy.
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(mask.logical_not(), float("-inf"))
    return AttentionPlan(mask=mask, is_causal=mask is None)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K)) v over the keys that ``plan`` shows to each query, (B, H, T, K).

    Args:
        q: (B, H, T, K). k, v: (B, G, S, K); each kv head serves J neighbouring query heads.
    """
    if plan.blocks is not None:
        return block_attention(q, k, v, plan.blocks)
    if plan.documents is not None:
        return varlen_attention.varlen_attention(q, k, v, plan.documents)
    if plan.page_groups is not None:
        return paged_attention(q, k, v, plan.page_groups)
    n_rows, n_heads, n_queries, head_dim = q.shape
    n_groups = k.shape[1]
    if n_queries == 1 and n_groups < n_heads and not plan.is_causal:
        # One new token: the J query heads of a kv head are J queries of it, and no kernel has to share heads.
        grouped = q.reshape(n_rows, n_groups, -1, head_dim)  # (B, G, J, K)
        mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=plan.mask)
        return mixed.reshape(n_rows, n_heads, 1, head_dim)
    if n_groups < n_heads and needs_equal_heads(q.device.type, masked=plan.mask is not None):
        k, v = (t.repeat_interleave(n_heads // n_groups, dim=1) for t in (k, v))  # (B, H, S, K)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=plan.mask, is_causal=plan.is_causal, enable_gqa=k.shape[1] != n_heads
    )


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
