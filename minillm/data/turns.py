"""Where the answers are: the stretches of marked tokens in a store of conversations."""

import numpy as np

from minillm.data.cache.shards import Shard, TokenStore

SCAN = 1 << 24  # mask entries looked at together


def answer_turns(store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (document, first, end) of every marked turn, (n,) each: [first, end) within the document."""
    edges = [np.zeros(0, np.int64)]
    for shard, base in zip(store.shards, store.token_bases[:-1], strict=True):
        edges.append(_edges(shard) + base)
    edges = np.concatenate(edges)
    first, end = edges[0::2], edges[1::2]
    offsets = store.offsets
    document = np.searchsorted(offsets, first, side="right") - 1
    return document, first - offsets[document], end - offsets[document]


def _edges(shard: Shard) -> np.ndarray:
    """Return the token indices where the mask turns on and off, alternating. The first token of a document is never
    marked (nothing stands before it that could predict it), so no turn reaches over into the next document."""
    edges, before = [np.zeros(0, np.int64)], np.zeros(1, np.uint8)
    for start in range(0, shard.n_tokens, SCAN):
        mask = np.concatenate([before, shard.mask[start : start + SCAN]])
        edges.append(np.flatnonzero(mask[1:] != mask[:-1]) + start)
        before = mask[-1:]
    if before[0]:
        edges.append(np.array([shard.n_tokens]))
    return np.concatenate(edges)
