"""From documents to rows: shifts the targets by one, and fills rows with documents.

The shift happens only here. A stored document of n + 1 tokens gives n pairs (input, target):

    stored        s   a   b   c   e      s begins a text and e ends it; in our own tokenizers both are <|endoftext|>
    input_ids     s   a   b   c          all tokens but the last
    targets       a   b   c   e          all tokens but the first: targets[t] is the token after input_ids[t]
    position_ids  0   1   2   3

In a conversation only the tokens of the answers are targets (mask 1); all other targets are -100:

    stored        h     h     h     h     Yo    end      h: prompt and header, Yo: the answer, end: <|im_end|>
    mask          0     0     0     0     1     1
    input_ids     h     h     h     h     Yo
    targets       -100  -100  -100  Yo    end

Pretraining cuts the stream of all documents into rows (``text.py``); conversations and ``--packing best_fit`` fill rows
by ``best_fit`` below. Rows consist of *pieces*. A piece is a range of consecutive pairs of one document. In a row every
piece has its own ``document_ids`` (0, 1, ...; pieces never attend to each other) and positions from 0:

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

from minillm.data.cache.shards import TokenStore, encoding_identity
from minillm.data.sources.rejects import count_reasons
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError

IGNORE_INDEX = -100
WINDOW = 1 << 20  # pieces that best fit packs together: bounds its memory and time for huge files
NO_LIMIT = np.iinfo(np.int64).max


class Pieces(NamedTuple):
    """n pieces; all arrays (n,). Token indices count from the beginning of the document."""

    document: np.ndarray
    start: np.ndarray  # index of the first pair
    length: np.ndarray  # number of pairs
    first_target: np.ndarray | None = None  # only tokens in [first_target, end_target) are targets
    end_target: np.ndarray | None = None

    def take(self, index) -> "Pieces":
        """Return the pieces at ``index`` (a slice or an index array)."""
        return Pieces(*(None if column is None else column[index] for column in self))


def assemble(store: TokenStore, pieces: Pieces) -> dict[str, np.ndarray]:
    """Return the columns of the pieces laid end to end: ``input_ids``, ``targets``, ``position_ids``,
    ``document_ids``, each (Σ length,) int64."""
    document, start, length = pieces.document, pieces.start, pieces.length
    n_pairs = int(length.sum())
    piece_ends = np.cumsum(length)
    positions = np.arange(n_pairs) - np.repeat(piece_ends - length, length)
    first_token = store.offsets[document] + start
    token_index = np.repeat(first_token, length) + positions
    input_ids = store.gather("tokens", token_index)
    # The targets are the inputs shifted by one; only the last target of a piece, the token after it, is gathered.
    targets = np.empty_like(input_ids)
    targets[:-1] = input_ids[1:]
    targets[piece_ends - 1] = store.gather("tokens", first_token + length)
    if store.has_mask:
        is_target = store.gather("mask", token_index + 1).astype(bool)
        if pieces.first_target is not None:
            index_in_document = np.repeat(start, length) + positions + 1  # of the target
            is_target &= index_in_document >= np.repeat(pieces.first_target, length)
            is_target &= index_in_document < np.repeat(pieces.end_target, length)
        targets[~is_target] = IGNORE_INDEX
    return {
        "input_ids": input_ids,
        "targets": targets,
        "position_ids": positions,
        "document_ids": np.repeat(np.arange(len(length)), length),
    }


def cut_long(n_pairs: np.ndarray, max_seq_len: int) -> Pieces:
    """Return documents of ``n_pairs`` (n,) pairs, cut into pieces of at most ``max_seq_len`` pairs; no pair is lost."""
    n_pieces = -(-n_pairs // max_seq_len)  # rounded up
    document = np.repeat(np.arange(len(n_pairs)), n_pieces)
    first_piece = np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)  # of the document
    start = (np.arange(len(document)) - first_piece) * max_seq_len
    return Pieces(document, start, np.minimum(n_pairs[document] - start, max_seq_len))


def best_fit(lengths: np.ndarray, capacity: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pack items into rows, best-fit decreasing (Johnson 1974: at most 11/9 of the optimum plus a constant).

    Items are first shuffled by ``seed``, so that the order of items of equal length is random. Then each item, longest
    first, goes into the fullest row in which it fits.

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
    """Return the row of each item, (n,), for ``lengths`` in descending order.

    Rows with n free positions are in bucket n. Bit n of the integer ``nonempty`` says whether bucket n has a row. So
    the fullest row in which an item fits is in the bucket of the lowest set bit at or above the item's length, and one
    bit operation finds it.
    """
    buckets: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty = 0
    row_of, n_rows = np.empty(len(lengths), np.int64), 0
    for item, length in enumerate(lengths):
        fitting = nonempty >> length
        if fitting:
            lowest_set_bit = (fitting & -fitting).bit_length() - 1
            n_free = length + lowest_set_bit
            row = buckets[n_free].pop()
            if not buckets[n_free]:
                nonempty &= ~(1 << n_free)
        else:
            n_free, row = capacity, n_rows
            n_rows += 1
        row_of[item] = row
        n_left = n_free - length
        if n_left:
            buckets[n_left].append(row)
            nonempty |= 1 << n_left
    return row_of


def check_max_seq_len(max_seq_len: int) -> None:
    """Raise UserError unless a row has at least one position."""
    if max_seq_len < 1:
        raise UserError(f"--max_seq_len {max_seq_len}: a row needs at least 1 position")


class PackedRows:
    """Rows of pairs over a ``TokenStore``: the base class of ``TextRows``, ``ChatRows`` and the rows of replies.

    ``len(rows)`` is the number of rows; ``rows[i]`` is a dict of the row's columns, 1-D int64 arrays of equal length,
    at most ``max_seq_len``.

    Attributes:
        lengths: (n_rows,) pairs per row.
        fixed_len: the length that rows are padded to; None: the longest row of each batch.
        n_targets: in the unit of the loss.
        log_prob: Σ log-probability of the data in nats, where it is known.
        target_bytes: UTF-8 bytes of the targets' text.
        data_hash: hash of everything that decides the rows.
        summary: what was read, rejected and cut (``_summarise``).
    """

    n_targets: float
    log_prob: float | None
    data_hash: str
    summary: dict
    target_bytes: int

    def __init__(self, store: TokenStore, tokenizer, source: DataFiles, *, max_seq_len: int, fixed_len: int | None):
        self.store, self.tokenizer, self.source, self.files = store, tokenizer, source, source.files
        self.max_seq_len, self.fixed_len = max_seq_len, fixed_len

    def hash_with(self, *settings) -> str:
        """Return the hash of everything that decides these rows: data, tokenizer, and ``settings`` (JSON values)."""
        encoding = encoding_identity(self.tokenizer, is_text=not self.store.has_mask)
        files = [shard.meta["sha256"] for shard in self.store.shards]
        everything = [*settings, encoding, self.source.key, files]
        return hashlib.sha256(json.dumps(everything).encode()).hexdigest()

    def set_pieces(self, pieces: Pieces, packing: str, seed: int) -> None:
        """Arrange ``pieces`` in rows: "best_fit" packs them, "none" gives each its own row."""
        if packing == "best_fit":
            order, self._row_starts = best_fit(pieces.length, self.max_seq_len, seed=seed)
            pieces = pieces.take(order)
        else:
            self._row_starts = np.arange(len(pieces.length) + 1)
        self._pieces = pieces

    def __len__(self) -> int:
        return len(self._row_starts) - 1

    def pieces(self, first_row: int, end_row: int) -> Pieces:
        """Return the pieces of rows ``first_row`` to ``end_row`` (exclusive), in order."""
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
        rows_at_once = max(1, (1 << 22) // self.max_seq_len)
        for first_row in range(0, len(self), rows_at_once):
            end_row = min(first_row + rows_at_once, len(self))
            targets = assemble(self.store, self.pieces(first_row, end_row))["targets"]
            counts += np.bincount(targets[targets != IGNORE_INDEX], minlength=len(counts))
        return counts

    def _summarise(
        self,
        unit: str,
        *,
        unused: list[list[tuple[int, str]]],
        cut: int,
        targets_lost: int,
        cache_dir: Path,
        documents_per_record: int = 1,
    ) -> dict:
        """Return the ``summary``; write ``.rejected.jsonl`` next to every file.

        Args:
            unit: the name of usable records: "documents", "conversations", "pairs", "replies".
            unused: by file, the (line, reason) of records that were tokenised but are in no row.
            cut: number of usable records that are longer than ``max_seq_len``.
            targets_lost: number of targets that this cuts off.
        """
        rejected_files = self.store.publish_rejected(self.source, unused, cache_dir)
        rejected_lines = list(zip(self.files, self.store.rejected_lines(unused), strict=True))
        files = [
            {
                "path": str(file),
                "sha256": shard.meta["sha256"],
                "records": shard.n_documents // documents_per_record + shard.meta["n_rejected"],
                "rejected": len(lines),
                "documents": shard.n_documents - documents_per_record * len(unused_of_file),
                "tokens": shard.n_tokens,
            }
            for (file, lines), shard, unused_of_file in zip(rejected_lines, self.store.shards, unused, strict=True)
        ]
        n_pairs = int(self.lengths.sum())
        return {
            "files": files,
            "unit": unit,
            **{name: sum(file[name] for file in files) for name in ("records", "rejected", "documents", "tokens")},
            "usable": sum(file["records"] - file["rejected"] for file in files),
            "reasons": count_reasons(rejected_lines),
            "rejected_files": rejected_files,
            "cut": cut,
            "targets_lost": targets_lost,
            "rows": len(self),
            "pairs": n_pairs,
            "targets": int(self.n_targets),
            "fill": n_pairs / (len(self) * (self.fixed_len or self.max_seq_len)),
        }
