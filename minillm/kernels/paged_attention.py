"""Attention of many requests whose keys and values lie in pages: the plain expression, and one call per group.

The tokens of all requests stand behind each other in one row: a request that decodes has one, one whose prompt is read
has a stretch of it. Everything else in the model looks at each token alone and needs to know nothing of requests. Here
each request's queries meet the keys in its own pages (Kwon et al., PagedAttention, 2023, section 4.1).

Legend: H query heads, G kv heads, J = H / G, K head width, N tokens of all requests; of one group: b requests, T
queries each, P pages each, L slots per page, S = P·L keys.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PageGroup(NamedTuple):
    """Requests with about the same number of new tokens; those with fewer repeat their last query.

    Attributes:
        queries: (b, T), where in the row the queries stand; None: the group is the row, b = N requests with T = 1.
        n_queries: (b,), how many of them count; None: all T.
        pages: (b, P), the pages of each request, in the order of its tokens; behind its last page any number.
        mask: (b, 1, T, S), numbers to add to the scores: 0 where a query sees a key, else -inf.
    """

    queries: Tensor | None
    n_queries: Tensor | None
    pages: Tensor
    mask: Tensor


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, groups: list[PageGroup]) -> Tensor:
    """Return what each query gathers from the keys that it sees, (1, H, N, K).

    Args:
        q: (1, H, N, K). keys, values: (pages, L, G, K), those of all requests, the new ones included.
    """
    n_heads, head_dim = q.shape[1], q.shape[3]
    rows = q[0].transpose(0, 1)  # (N, H, K)
    if groups[0].queries is None:
        return _attend(rows[:, None], keys, values, groups[0])[:, 0].transpose(0, 1)[None]
    mixed = torch.empty_like(rows)
    for group in groups:
        found = _attend(rows[group.queries], keys, values, group)  # (b, T, H, K)
        if group.n_queries is None:
            mixed[group.queries.reshape(-1)] = found.reshape(-1, n_heads, head_dim)
        else:
            counts = torch.arange(found.shape[1], device=q.device) < group.n_queries[:, None]  # (b, T)
            mixed[group.queries[counts]] = found[counts]
    return mixed.transpose(0, 1)[None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, group: PageGroup) -> Tensor:
    """Return softmax(q kᵀ / sqrt(K) + mask) v for the queries (b, T, H, K) of one group, in the same shape."""
    n_requests, n_queries, n_heads, head_dim = q.shape
    n_groups = keys.shape[2]
    # (b, P) into (pages, L, G, K) → (b, P, L, G, K) → (b, G, S, K)
    k, v = (t[group.pages].view(n_requests, -1, n_groups, head_dim).transpose(1, 2) for t in (keys, values))
    k, v, mask = k.to(q.dtype), v.to(q.dtype), group.mask.to(q.dtype)
    if n_queries == 1:  # the J query heads of a kv head are J queries of it, and no key is read twice
        grouped = q.view(n_requests, n_groups, -1, head_dim)  # (b, G, J, K)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)
    if n_groups < n_heads:
        k, v = (t.repeat_interleave(n_heads // n_groups, dim=1) for t in (k, v))  # (b, H, S, K)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def plain_paged_attention(q: Tensor, keys: Tensor, values: Tensor, groups: list[PageGroup]) -> Tensor:
    """The same, one query of one head at a time."""
    mixed = torch.zeros_like(q)
    for group in groups:
        queries = torch.arange(q.shape[2])[:, None] if group.queries is None else group.queries
        for request, places in enumerate(queries.tolist()):
            counted = len(places) if group.n_queries is None else int(group.n_queries[request])
            k = keys[group.pages[request]].flatten(0, 1)  # (S, G, K)
            v = values[group.pages[request]].flatten(0, 1)
            for t, place in enumerate(places[:counted]):
                for head in range(q.shape[1]):
                    kv_head = head // (q.shape[1] // keys.shape[2])
                    scores = k[:, kv_head] @ q[0, head, place] / q.shape[3] ** 0.5 + group.mask[request, 0, t]
                    mixed[0, head, place] = scores.softmax(0) @ v[:, kv_head]
    return mixed
