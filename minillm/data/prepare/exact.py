"""Exact duplicates: equal text, apart from Unicode form, upper case and white space.

Only a hash of 128 bits stays of each record, in an array on disk. Sorting the hashes brings equal ones together:

    records   0:b  1:a  2:b  3:c      sorted   a:1  b:0  b:2  c:3      2 is a duplicate of 0
"""

import hashlib
import json
import unicodedata

import numpy as np

from minillm.data.schema import Record

HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def normal_text(text: str) -> str:
    """Return the text in Unicode's NFKC form, in lower case, with white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_hash(record: Record) -> bytes:
    """Return 16 bytes that are equal for records of equal kind, roles, normal texts, label and tools."""
    parts: list = [record.kind, record.label]
    if record.tools is not None:
        parts.append(record.tools)
    if record.kind == "text":
        parts.append(normal_text(record.text))
    for turns in (record.messages, record.chosen, record.rejected):
        for turn in turns or ():
            said = {key: normal_text(turn[key]) for key in ("reasoning_content", "content") if turn.get(key)}
            parts.append([turn["role"], said, turn.get("tool_calls") or []])
        parts.append(None)
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """Return for each hash (n,), dtype ``HASH``, the index of the first equal one, which may be its own: (n,) int64."""
    n = len(hashes)
    first = np.arange(n)
    if n < 2:
        return first
    high, low = np.ascontiguousarray(hashes["high"]), np.ascontiguousarray(hashes["low"])
    order = np.lexsort((low, high))  # stable, so equal hashes keep their order
    high, low = high[order], low[order]
    is_new = np.ones(n, bool)
    is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    starts = np.flatnonzero(is_new)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, n)))
    return first
