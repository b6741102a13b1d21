"""Finds the answers in tokenised conversations: the ranges of tokens whose mask is 1."""

import numpy as np

from minillm.data.cache.shards import Shard, TokenStore

CHUNK = 1 << 24  # mask entries read at once


def answer_turns(store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (document, first, end) of every answer, (n,) each: tokens [first, end) of the document."""
    edges = np.concatenate(
        [_mask_edges(shard) + base for shard, base in zip(store.shards, store.token_bases[:-1], strict=True)]
    )
    first, end = edges[0::2], edges[1::2]
    document = np.searchsorted(store.offsets, first, side="right") - 1
    document_start = store.offsets[document]
    return document, first - document_start, end - document_start


def _mask_edges(shard: Shard) -> np.ndarray:
    """Return the token indices where the mask changes: to 1, to 0, to 1, and so on.

    The mask of a document's first token is always 0 (no token before it could predict it), so no range crosses into the
    next document.
    """
    edges, last_of_chunk = [np.zeros(0, np.int64)], np.zeros(1, np.uint8)
    for start in range(0, shard.n_tokens, CHUNK):
        mask = np.concatenate([last_of_chunk, shard.mask[start : start + CHUNK]])
        edges.append(np.flatnonzero(mask[1:] != mask[:-1]) + start)
        last_of_chunk = mask[-1:]
    if last_of_chunk[0]:
        edges.append(np.array([shard.n_tokens]))
    return np.concatenate(edges)
