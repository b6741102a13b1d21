"""Pretraining rows: every token of every document is a target exactly once per epoch."""

import bisect
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.shards import TokenStore, prepare
from minillm.data.packing import PackedRows, Pieces, check_max_seq_len, cut_long
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError

PACKINGS = ("stream", "best_fit", "none")


class TextRows(PackedRows):
    """Rows of plain text. A document of n tokens, stored with its beginning and end, gives n + 1 pairs.

    Args:
        path: files with ``{"text"}`` records, or ``.txt``; whatever ``expand_paths`` takes, or ``DataFiles`` (one
            side of a split, other names for keys).
        max_seq_len: row length T in pairs.
        packing: "stream" lays all documents end to end and cuts every T pairs, so only the last row is short;
            a document that goes on in the next row restarts there at position 0, without its beginning.
            "best_fit" keeps documents whole and fills rows with those that fit; "none" gives each a row of
            its own. In both, a document of more than T pairs is cut into rows.
        cache_dir: where tokenised files are kept. strict: a bad line is fatal. seed: of the packing.

    ``target_bytes`` counts the documents' UTF-8 bytes; beginning and end count 0. ``summary["cut"]`` counts the
    documents longer than a row. Raises UserError for bad arguments and files (see ``prepare``).
    """

    def __init__(
        self,
        path: str | Path | list | DataFiles,
        tokenizer,
        *,
        max_seq_len: int,
        packing: str = "stream",
        cache_dir: str | Path = "out/.token_cache",
        strict: bool = False,
        seed: int = 0,
    ):
        check_max_seq_len(max_seq_len)
        if packing not in PACKINGS:
            raise UserError(f"packing {packing!r} for text: allowed are {', '.join(PACKINGS)}")
        source = DataFiles.of(path)
        store = TokenStore(prepare(source, tokenizer, kind="text", cache_dir=cache_dir, strict=strict))
        fixed_len = None if packing == "none" else max_seq_len
        super().__init__(store, tokenizer, source, max_seq_len=max_seq_len, fixed_len=fixed_len)
        self.packing = packing
        n_pairs = store.n_tokens - store.n_documents
        if packing == "stream":
            self._n_rows = -(-n_pairs // max_seq_len)
        else:
            pieces = cut_long(np.diff(store.offsets) - 1, max_seq_len)
            self.set_pieces(pieces, packing, seed)
        self.n_targets = float(n_pairs)
        self.target_bytes = sum(shard.meta["n_bytes"] for shard in store.shards)
        self.log_prob = store.log_prob()
        self.data_hash = self.hash_with("text", max_seq_len, packing, seed)
        cut = int(np.count_nonzero(np.diff(store.offsets) - 1 > max_seq_len))
        nothing = [[] for _ in self.files]
        self.summary = self._summarise(
            "documents", set_aside=nothing, cut=cut, targets_lost=0, cache_dir=Path(cache_dir)
        )

    def __len__(self) -> int:
        return self._n_rows if self.packing == "stream" else super().__len__()

    @cached_property
    def lengths(self) -> np.ndarray:
        """(n_rows,) number of pairs in each row."""
        if self.packing != "stream":
            return super().lengths
        lengths = np.full(self._n_rows, self.max_seq_len)
        lengths[-1] = int(self.n_targets) - (self._n_rows - 1) * self.max_seq_len
        return lengths

    def pieces(self, first_row: int, end_row: int) -> Pieces:
        """Return the pieces of rows ``first_row`` to ``end_row`` (not included), in order."""
        if self.packing != "stream":
            return super().pieces(first_row, end_row)
        # Document d's pairs begin at offsets[d] - d, since each document has one pair less than tokens. For a
        # stream nothing is laid out in memory: the documents of a row are found when it is asked for.
        offsets = self.store.offsets
        begin, end = first_row * self.max_seq_len, min(end_row * self.max_seq_len, int(self.n_targets))
        first = self._document_at(begin)
        documents = np.arange(first, self._document_at(end - 1) + 1)
        starts = np.maximum(offsets[documents] - documents, begin)
        cuts = np.arange(first_row + 1, end_row) * self.max_seq_len  # row ends within the stretch
        bounds = np.union1d(starts, cuts)
        documents = first + np.searchsorted(starts, bounds, side="right") - 1
        lengths = np.diff(bounds, append=end)
        return Pieces(documents, bounds - (offsets[documents] - documents), lengths)

    def _document_at(self, pair: int) -> int:
        offsets = self.store.offsets
        return bisect.bisect_right(range(self.store.n_documents), pair, key=lambda d: offsets[d] - d) - 1
