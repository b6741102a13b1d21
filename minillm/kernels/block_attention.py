"""Attention for training on a CPU: short blocks of queries against only the keys that they may see.

torch's CPU kernel computes every score of a masked row, spends most of its time in the gradient, and recomputes
the scores there. Here a block of 64 queries meets the keys from the first one that any of its rows may look at (the
start of the earliest document that reaches into the block) to its own last; everything else is never computed.
The probabilities are kept for the gradient, as in the textbook, which is why long rows go another way. Where weights
are frozen and an adapter is trained, memory is what counts: they are then computed a second time, to the same bits.

Vaswani et al., Attention Is All You Need (2017), section 3.2; the gradient is the softmax's.

Legend: B batch, T positions, H query heads, G kv heads, J = H / G, K head width, N queries of a block, M its keys.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_LEN = 64  # queries: small enough for the scores to stay in the cache, large enough for the products
MAX_SEQ_LEN = 1024  # the kept probabilities grow with T²: B·H·T² numbers at most per layer


class Tile(NamedTuple):
    """Queries ``start`` to ``end`` of rows ``row`` to ``end_row``, against keys ``first`` to ``end``."""

    row: int
    end_row: int
    start: int
    end: int
    first: int


class Blocks(NamedTuple):
    """Who sees whom in one batch, the same for all layers."""

    bias: Tensor  # (B or 1, 1, 1, T, T): 0 where a query may look, −inf elsewhere, in the dtype of the scores
    tiles: list[Tile]
    keep: bool = True  # the probabilities, for the gradient


def plan_blocks(
    mask: Tensor | None, shape: tuple[int, int], *, dtype: torch.dtype, device: torch.device, keep: bool = True
) -> Blocks:
    """Return the plan of a batch.

    Rows share their tiles, unless long rows of short documents would make them share too many keys that only one of
    them may see: then each row gets its own.

    Args:
        mask: (B, 1, T, T), true where a query may look, never later than itself; None: causal.
        shape: (B, T). dtype: of queries and keys. keep: the probabilities, rather than computing them again.
    """
    n_rows, seq_len = shape
    if mask is None:
        mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool, device=device).tril()
    bias = torch.zeros(mask.shape, device=device, dtype=dtype).masked_fill_(~mask, float("-inf"))[:, :, None]
    first = mask[:, 0].to(torch.uint8).argmax(dim=2)  # (B or 1, T): the first key that each query may see
    shared = _tiles(first.amin(dim=0), 0, n_rows, BLOCK_LEN)
    if len(first) > 1:
        own = [tile for row in range(n_rows) for tile in _tiles(first[row], row, row + 1, 2 * BLOCK_LEN)]
        if _work(own) < 0.8 * _work(shared):
            return Blocks(bias, own, keep)
    return Blocks(bias, shared, keep)


def _tiles(first_keys: Tensor, row: int, end_row: int, block_len: int) -> list[Tile]:
    ends = range(block_len, len(first_keys) + block_len, block_len)
    blocks = zip(ends, first_keys.split(block_len), strict=True)
    return [Tile(row, end_row, end - block_len, min(end, len(first_keys)), int(keys.min())) for end, keys in blocks]


def _work(tiles: list[Tile]) -> int:
    return sum((t.end_row - t.row) * (t.end - t.start) * (t.end - t.first) for t in tiles)


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K) + bias) v, (B, H, T, K).

    Args:
        q: (B, H, T, K). k, v: (B, G, T, K); each key head serves J neighbouring query heads.
    """
    return _BlockAttention.apply(q, k, v, blocks)


class _BlockAttention(torch.autograd.Function):
    """The products, softmax and gradient behind ``block_attention``."""

    @staticmethod
    def forward(ctx, q, k, v, blocks):
        n_rows, n_heads, seq_len, head_dim = q.shape
        n_groups = k.shape[1]
        q = (q * head_dim**-0.5).view(n_rows, n_groups, -1, seq_len, head_dim)  # (B, G, J, T, K)
        k, v = (t.reshape(-1, seq_len, head_dim) for t in (k, v))  # (B·G, T, K)
        out = q.new_empty(n_rows, seq_len, n_groups, n_heads // n_groups, head_dim)  # (B, T, G, J, K)
        kept = []
        for tile in blocks.tiles:
            row, end_row, start, end, first = tile
            rows, groups, n = slice(row, end_row), slice(row * n_groups, end_row * n_groups), end - start
            queries = q[rows, :, :, start:end].flatten(0, 1).flatten(1, 2)  # (B·G, J·N, K)
            shares = _shares(queries, k[groups, first:end], blocks.bias, tile)
            kept += [queries, shares] if blocks.keep else [queries]
            mixed = torch.bmm(shares, v[groups, first:end])  # (B·G, J·N, K)
            out[rows, start:end] = mixed.view(end_row - row, n_groups, -1, n, head_dim).permute(0, 3, 1, 2, 4)
        ctx.save_for_backward(k, v, *kept)
        ctx.blocks, ctx.n_groups = blocks, n_groups
        return out.view(n_rows, seq_len, n_heads, head_dim).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradients of q, k and v; ``grad`` is that of the output, (B, H, T, K).

        A tile with S = Q Kᵀ and P = softmax(S) has dV = Pᵀ dO, dP = dO Vᵀ, dS = P · (dP − Σ dP · P), dQ = dS K and
        dK = dSᵀ Q. Each tile writes its own queries' gradient; those of keys and values add up, over the tiles that
        see them and over the J query heads that share them.
        """
        k, v, *kept = ctx.saved_tensors
        n_rows, n_heads, seq_len, head_dim = grad.shape
        n_groups = ctx.n_groups
        grad = grad.reshape(n_rows, n_groups, -1, seq_len, head_dim)  # (B, G, J, T, K)
        grad_q = grad.new_empty(n_rows, seq_len, n_groups, n_heads // n_groups, head_dim)  # (B, T, G, J, K)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for index, tile in enumerate(ctx.blocks.tiles):
            row, end_row, start, end, first = tile
            rows, groups, n = slice(row, end_row), slice(row * n_groups, end_row * n_groups), end - start
            if ctx.blocks.keep:
                queries, shares = kept[2 * index : 2 * index + 2]
            else:
                queries = kept[index]
                shares = _shares(queries, k[groups, first:end], ctx.blocks.bias, tile)
            grad_mixed = grad[rows, :, :, start:end].flatten(0, 1).flatten(1, 2)  # (B·G, J·N, K)
            grad_v[groups, first:end] += torch.bmm(shares.transpose(1, 2), grad_mixed)
            grad_shares = torch.bmm(grad_mixed, v[groups, first:end].transpose(1, 2))  # (B·G, J·N, M)
            # d softmax: shares · (grad − Σ grad · shares)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, shares.dtype)
            of_queries = torch.bmm(grad_scores, k[groups, first:end])  # (B·G, J·N, K)
            grad_q[rows, start:end] = of_queries.view(end_row - row, n_groups, -1, n, head_dim).permute(0, 3, 1, 2, 4)
            grad_k[groups, first:end] += torch.bmm(grad_scores.transpose(1, 2), queries)
        grad_q = grad_q.mul_(head_dim**-0.5).view(n_rows, seq_len, n_heads, head_dim).transpose(1, 2)
        grad_k, grad_v = (t.view(n_rows, n_groups, seq_len, head_dim) for t in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None


def _shares(queries: Tensor, keys: Tensor, bias: Tensor, tile: Tile) -> Tensor:
    """Return the probabilities of a tile, (B·G, J·N, M), from queries (B·G, J·N, K) and keys (B·G, M, K)."""
    row, end_row, start, end, first = tile
    scores = torch.bmm(queries, keys.transpose(1, 2))  # (B·G, J·N, M)
    seen = bias[row:end_row] if len(bias) > 1 else bias  # (B or 1, 1, 1, T, T)
    by_row = scores.view(end_row - row, len(queries) // (end_row - row), -1, end - start, end - first)
    by_row.add_(seen[:, :, :, start:end, first:end])
    return torch.softmax(scores, dim=-1)
