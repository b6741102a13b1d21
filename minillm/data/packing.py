"""From documents to rows: where the shift happens, and how rows are filled.

The shift happens here, once, and nowhere else. A stored document of n + 1 tokens gives n pairs:

    stored        s   a   b   c   e      s begins a text and e ends it; in our own tokenizers both are <|endoftext|>
    input_ids     s   a   b   c          all tokens but the last
    targets       a   b   c   e          all tokens but the first: targets[t] is the token after input_ids[t]
    position_ids  0   1   2   3

In a conversation a target stays only where the stored token is to be predicted; elsewhere it is -100:

    stored        <|im_start|> user \\n Hi <|im_end|> \\n <|im_start|> assistant \\n  Yo  <|im_end|>
    mask                0        0   0  0      0       0       0           0      0   1       1
    targets           -100     -100 ...              ...    -100          Yo   <|im_end|>

Rows are filled with *pieces*: stretches of pairs, each from one document. In a row every piece has its own
``document_ids`` (0, 1, ...; pieces never attend to each other) and positions from 0:

    pieces          A A A A A B B B . .      . is padding, added by collate: targets -100, documents -1
    document_ids    0 0 0 0 0 1 1 1 - -
    position_ids    0 1 2 3 4 0 1 2 0 0
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.cache.shards import TokenStore, encoding_identity, split_paths
from minillm.data.sources.rejects import count_reasons
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError

IGNORE_INDEX = -100
WINDOW = 1 << 20  # pieces that best fit looks at together: bounds its memory and time for huge files
NO_LIMIT = np.iinfo(np.int64).max


class Pieces(NamedTuple):
    """Stretches of pairs, one entry each; all arrays (n,). Token indices count within the document."""

    document: np.ndarray
    start: np.ndarray  # index of the first pair
    length: np.ndarray  # number of pairs
    first_target: np.ndarray | None = None  # only stored tokens in [first_target, end_target) are targets
    end_target: np.ndarray | None = None

    def take(self, index) -> "Pieces":
        """Return the pieces at ``index`` (a slice or an index array)."""
        return Pieces(*(None if column is None else column[index] for column in self))


def assemble(store: TokenStore, pieces: Pieces) -> dict[str, np.ndarray]:
    """Return the pieces' pairs one after the other: ``input_ids``, ``targets``, ``position_ids``,
    ``document_ids``, each (Σ length,) int64."""
    document, start, length = pieces.document, pieces.start, pieces.length
    n_pairs = int(length.sum())
    ends = np.cumsum(length)
    position = np.arange(n_pairs) - np.repeat(ends - length, length)
    first_token = store.offsets[document] + start
    index = np.repeat(first_token, length) + position
    # One gather serves both columns: the inputs, and one more token behind each piece.
    inputs = store.gather("tokens", index)
    targets = np.empty_like(inputs)
    targets[:-1] = inputs[1:]
    targets[ends - 1] = store.gather("tokens", first_token + length)
    if store.has_mask:
        keep = store.gather("mask", index + 1).astype(bool)
        if pieces.first_target is not None:
            place = np.repeat(start, length) + position + 1  # the target's index within its document
            keep &= place >= np.repeat(pieces.first_target, length)
            keep &= place < np.repeat(pieces.end_target, length)
        targets[~keep] = IGNORE_INDEX
    return {
        "input_ids": inputs,
        "targets": targets,
        "position_ids": position,
        "document_ids": np.repeat(np.arange(len(length)), length),
    }


def cut_long(n_pairs: np.ndarray, max_seq_len: int) -> Pieces:
    """Return documents of ``n_pairs`` as pieces of at most ``max_seq_len`` pairs; nothing is thrown away."""
    n_pieces = -(-n_pairs // max_seq_len)
    document = np.repeat(np.arange(len(n_pairs)), n_pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * max_seq_len
    return Pieces(document, start, np.minimum(n_pairs[document] - start, max_seq_len))


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into rows, best-fit decreasing (Johnson 1974: at most 11/9 of the optimum plus a constant).

    Items are shuffled by ``seed`` first, so that items of equal length meet in no particular order; then
    each, longest first, goes into the fullest row it fits in. The rows with exactly c places left form
    bucket c, and bit c of an integer says whether the bucket holds any: the best bucket is the lowest set bit
    at or above the item's length, found in one operation instead of a search.

    Args:
        lengths: (n,) each from 1 to ``capacity``.

    Returns:
        ``(order, row_starts)``: row r holds the items ``order[row_starts[r]:row_starts[r + 1]]``.
    """
    rng = np.random.default_rng(seed)
    order, row_starts = [], [np.zeros(1, np.int64)]
    for begin in range(0, len(lengths), WINDOW):
        items = begin + rng.permutation(min(WINDOW, len(lengths) - begin))
        items = items[np.argsort(-lengths[items], kind="stable")]
        row_of = _rows_of(lengths[items].tolist(), capacity)
        by_row = np.argsort(row_of, kind="stable")
        order.append(items[by_row])
        sizes = np.bincount(row_of)
        row_starts.append(row_starts[-1][-1] + np.cumsum(sizes))
    return np.concatenate([*order, np.zeros(0, np.int64)]), np.concatenate(row_starts)


def _rows_of(lengths: list[int], capacity: int) -> np.ndarray:
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by free places
    filled = 0  # bit c: bucket c is not empty
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths):
        fitting = filled >> length
        if fitting:
            free = length + (fitting & -fitting).bit_length() - 1
            row = buckets[free].pop()
            if not buckets[free]:
                filled &= ~(1 << free)
        else:
            free, row = capacity, n_rows
            n_rows += 1
        row_of[item] = row
        left = free - length
        if left:
            buckets[left].append(row)
            filled |= 1 << left
    return row_of


def check_max_seq_len(max_seq_len: int) -> None:
    """Raise UserError unless a row has at least one position."""
    if max_seq_len < 1:
        raise UserError(f"--max_seq_len {max_seq_len}: a row needs at least 1 position")


class PackedRows:
    """Rows of pairs over a ``TokenStore``; the common part of ``TextRows`` and ``ChatRows``.

    ``len(rows)``; ``rows[i]`` → the row's columns, 1-D int64 arrays of equal length <= max_seq_len.

    Attributes: ``lengths`` (n_rows,) pairs per row; ``fixed_len`` the length that rows are padded to (None:
    the longest of a batch); ``n_targets`` float; ``log_prob`` nats or None; ``data_hash``; ``summary``.
    """

    n_targets: float
    log_prob: float | None
    data_hash: str
    summary: dict
    target_bytes: int

    def __init__(self, store: TokenStore, tokenizer, source: DataFiles, *, max_seq_len: int, fixed_len: int | None):
        self.store, self.tokenizer, self.source, self.files = store, tokenizer, source, split_paths(source)
        self.max_seq_len, self.fixed_len = max_seq_len, fixed_len

    def hash_with(self, *settings) -> str:
        """Return the hash of everything that decides these rows: data, tokenizer, and ``settings`` (JSON values)."""
        encoding = encoding_identity(self.tokenizer, is_text=not self.store.has_mask)
        files = [shard.meta["sha256"] for shard in self.store.shards]
        everything = [*settings, encoding, self.source.key, files]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def set_pieces(self, pieces: Pieces, packing: str, seed: int) -> None:
        """Lay ``pieces`` out in rows: ``best_fit`` packs them, ``none`` gives each a row of its own."""
        if packing == "best_fit":
            order, self._row_starts = best_fit(pieces.length, self.max_seq_len, seed=seed)
            pieces = pieces.take(order)
        else:
            self._row_starts = np.arange(len(pieces.length) + 1)
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def pieces(self, first_row: int, end_row: int) -> Pieces:
        """Return the pieces of rows ``first_row`` to ``end_row`` (not included), in order."""
        return self._pieces.take(slice(self._row_starts[first_row], self._row_starts[end_row]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n_rows,) number of pairs in each row."""
        return np.add.reduceat(self._pieces.length, self._row_starts[:-1])

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return assemble(self.store, self.pieces(row, row + 1))

    @cached_property
    def target_counts(self) -> np.ndarray:
        """(V,) how often each token is a target, over all rows."""
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        step = max(1, (1 << 22) // self.max_seq_len)
        for row in range(0, len(self), step):
            targets = assemble(self.store, self.pieces(row, min(row + step, len(self))))["targets"]
            counts += np.bincount(targets[targets != IGNORE_INDEX], minlength=len(counts))
        return counts

    def _summarise(
        self,
        unit: str,
        *,
        set_aside: list[list[tuple[int, str]]],
        cut: int,
        targets_lost: int,
        cache_dir: Path,
        documents_per_record: int = 1,
    ) -> dict:
        """Return the ``summary``; write the rejected records of every file next to it.

        Args:
            unit: what a usable record is, for people: "documents", "conversations", "pairs", "replies".
            set_aside: (line, reason) of the records that were read and are in no row, by file.
            cut: how many usable records lose a part at ``max_seq_len``. targets_lost: by that.
        """
        shards = self.store.shards
        places = self.store.publish_rejected(self.source, set_aside, cache_dir)
        rejected_lines = list(zip(self.files, self.store.rejected_lines(set_aside), strict=True))
        files = [
            {
                "path": str(file),
                "sha256": shard.meta["sha256"],
                "records": shard.n_documents // documents_per_record + shard.meta["n_rejected"],
                "rejected": len(lines),
                "documents": shard.n_documents - documents_per_record * len(aside),
                "tokens": shard.n_tokens,
            }
            for (file, lines), shard, aside in zip(rejected_lines, shards, set_aside, strict=True)
        ]
        n_pairs = int(self.lengths.sum())
        return {
            "files": files,
            "unit": unit,
            **{name: sum(file[name] for file in files) for name in ("records", "rejected", "documents", "tokens")},
            "usable": sum(file["records"] - file["rejected"] for file in files),
            "reasons": count_reasons(rejected_lines),
            "rejected_files": places,
            "cut": cut,
            "targets_lost": targets_lost,  # of usable records, by cutting
            "rows": len(self),
            "pairs": n_pairs,
            "targets": int(self.n_targets),
            "fill": n_pairs / (len(self) * (self.fixed_len or self.max_seq_len)),
        }
