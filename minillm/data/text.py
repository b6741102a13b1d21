"""Pretraining rows: every token of every document is a target exactly once per epoch."""

import bisect
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.data.packing import PackedRows, Pieces, check_max_seq_len, cut_long
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError

PACKINGS = ("stream", "best_fit", "none")


class TextRows(PackedRows):
    """Rows of plain text. A document of n tokens, stored with its begin and end tokens, gives n + 1 pairs.

    Args:
        path: files with ``{"text"}`` records, or ``.txt``; whatever ``expand_paths`` takes, or ``DataFiles``.
        max_seq_len: row length T in pairs.
        packing: "stream" lays all documents end to end and cuts every T pairs, so only the last row is short. A
            document that continues in the next row starts there at position 0, and its beginning is not visible.
            "best_fit" keeps documents whole and fills rows with documents that fit. "none" gives each document its own
            row. In both, a document of more than T pairs is cut into several pieces.
        cache_dir: directory of tokenised files.
        strict: a bad line is an error.
        seed: of the packing.

    ``target_bytes`` counts the documents' UTF-8 bytes; begin and end tokens count 0. ``summary["cut"]`` counts the
    documents longer than a row.

    Raises:
        UserError: bad arguments or files, as in ``tokenise_files``.
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
        store = TokenStore(tokenise_files(source, tokenizer, kind="text", cache_dir=cache_dir, strict=strict))
        fixed_len = None if packing == "none" else max_seq_len
        super().__init__(store, tokenizer, source, max_seq_len=max_seq_len, fixed_len=fixed_len)
        self.packing = packing
        document_lengths = np.diff(store.offsets) - 1  # in pairs
        n_pairs = store.n_tokens - store.n_documents
        if packing == "stream":
            self._n_rows = -(-n_pairs // max_seq_len)  # rounded up
        else:
            self.set_pieces(cut_long(document_lengths, max_seq_len), packing, seed)
        self.n_targets = float(n_pairs)
        self.target_bytes = sum(shard.meta["n_bytes"] for shard in store.shards)
        self.log_prob = store.log_prob()
        self.data_hash = self.hash_with("text", max_seq_len, packing, seed)
        self.summary = self._summarise(
            "documents",
            unused=[[] for _ in self.files],
            cut=int(np.count_nonzero(document_lengths > max_seq_len)),
            targets_lost=0,
            cache_dir=Path(cache_dir),
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
        """Return the pieces of rows ``first_row`` to ``end_row`` (exclusive), in order."""
        if self.packing != "stream":
            return super().pieces(first_row, end_row)
        # Row r of the stream holds the pairs r T to (r + 1) T of all documents laid end to end. No list of pieces is
        # in memory; they follow from the offsets. The pairs of document d begin at offsets[d] - d, because each
        # document has one pair less than tokens.
        offsets = self.store.offsets
        begin, end = first_row * self.max_seq_len, min(end_row * self.max_seq_len, int(self.n_targets))
        first_document = self._document_at(begin)
        documents = np.arange(first_document, self._document_at(end - 1) + 1)
        document_starts = np.maximum(offsets[documents] - documents, begin)
        row_starts = np.arange(first_row + 1, end_row) * self.max_seq_len
        piece_starts = np.union1d(document_starts, row_starts)
        piece_documents = first_document + np.searchsorted(document_starts, piece_starts, side="right") - 1
        starts_in_document = piece_starts - (offsets[piece_documents] - piece_documents)
        return Pieces(piece_documents, starts_in_document, np.diff(piece_starts, append=end))

    def _document_at(self, pair: int) -> int:
        """Return the document that holds the ``pair``-th pair of the stream."""
        offsets = self.store.offsets
        return bisect.bisect_right(range(self.store.n_documents), pair, key=lambda d: offsets[d] - d) - 1
