"""Tokenised documents on disk: ``Shard`` is one tokenised file, ``TokenStore`` several of them as one sequence.

A shard is a directory of plain arrays, which are memory-mapped (``tokenise.py`` writes it):

    tokens.bin    uint16 (uint32 for vocabularies over 65,536): the ids of all documents, one document after the other
    mask.bin      uint8, not for texts: 1 where the token is a target
    offsets.bin   int64, n_documents + 1: where each document begins
    lines.bin     int64: line of each document in its file
    bytes.bin     int64: UTF-8 bytes of each document's text
    log_prob.bin  float64: exact log-probability of each document (NaN if unknown)
    label.bin     int8, only for judged answers: 1 for a good one, 0 for a bad one
    rejected.jsonl, meta.json

A text is stored as a whole document (``Tokenizer.document``), a conversation as its chat encoding in which every
assistant turn is marked. Two kinds have two documents per record, in which only the last turn is marked: "preference"
has the chosen and the rejected reply to one prompt, "judged" a reply and the reply to another prompt.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.sealed import read_sealed
from minillm.data.sources.rejects import publish_rejected, reject_line
from minillm.data.sources.split import DataFiles

COLUMNS = {"offsets": np.int64, "lines": np.int64, "bytes": np.int64, "log_prob": np.float64}
LABEL = {"label": np.int8}


def encoding_identity(tokenizer, *, is_text: bool) -> str:
    """Return the hash of what decides a tokenizer's ids; for texts the chat template is not part of it."""
    return tokenizer.document_hash if is_text else tokenizer.encoding_hash


class Shard:
    """One tokenised file, memory-mapped. Arrays: ``tokens``, ``mask`` (or None), ``offsets``, ``lines``,
    ``bytes``, ``log_prob``, ``label``. It is pickled as its path, so that worker processes map it again."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.meta = read_sealed(self.path / "meta.json")

    def __getstate__(self):
        return {"path": self.path, "meta": self.meta}

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.meta["n_documents"]

    @property
    def n_tokens(self) -> int:
        """Number of stored tokens, including those that begin and end documents and turns."""
        return self.meta["n_tokens"]

    def _map(self, name: str, dtype) -> np.ndarray:
        path = self.path / f"{name}.bin"
        if not os.path.getsize(path):  # an empty side of a split: an empty file cannot be mapped
            return np.zeros(0, dtype)
        # A plain array over the same pages: indexing an np.memmap is several times slower.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) ids."""
        return self._map("tokens", self.meta["dtype"])

    @cached_property
    def mask(self) -> np.ndarray | None:
        """(n_tokens,) 1 where the token is a target; None for texts, in which every token is one."""
        return self._map("mask", np.uint8) if self.meta["kind"] != "text" else None

    def __getattr__(self, name: str) -> np.ndarray:
        dtype = (COLUMNS | LABEL).get(name)
        if dtype is None:
            raise AttributeError(name)
        column = self._map(name, dtype)
        self.__dict__[name] = column
        return column

    def rejected_lines(self) -> Iterator[str]:
        """Yield the lines of ``rejected.jsonl``, one for each bad line of the data file."""
        with (self.path / "rejected.jsonl").open(encoding="utf-8") as file:
            yield from file

    @classmethod
    def open_if_complete(cls, path: Path) -> "Shard | None":
        """Return the shard, or None if it is absent or a file has the wrong size (a full disk, a bad copy)."""
        try:
            shard = cls(path)
            is_complete = all(os.path.getsize(path / name) == size for name, size in shard.meta["sizes"].items())
        except (OSError, ValueError):
            return None
        return shard if is_complete else None


class TokenStore:
    """Several shards as one sequence of documents; token indices count over all of them."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.token_bases = np.cumsum([0] + [shard.n_tokens for shard in shards])
        self.has_mask = shards[0].meta["kind"] != "text"
        self.document_bases = np.cumsum([0] + [shard.n_documents for shard in shards])

    def __getstate__(self):  # offsets may be large or memory-mapped: worker processes rebuild them
        return {name: value for name, value in self.__dict__.items() if name != "offsets"}

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n_documents + 1,) where each document begins."""
        if len(self.shards) == 1:
            return self.shards[0].offsets
        shard_offsets = [s.offsets[:-1] + base for s, base in zip(self.shards, self.token_bases[:-1], strict=True)]
        return np.concatenate([*shard_offsets, self.token_bases[-1:]])

    @property
    def n_documents(self) -> int:
        """Number of documents in all shards."""
        return int(self.document_bases[-1])

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all shards."""
        return int(self.token_bases[-1])

    def gather(self, column: str, index: np.ndarray) -> np.ndarray:
        """Return ``tokens`` (int64) or ``mask`` (uint8) at global token indices."""
        dtype = np.int64 if column == "tokens" else np.uint8
        if len(self.shards) == 1:
            return getattr(self.shards[0], column)[index].astype(dtype)
        gathered = np.empty(len(index), dtype)
        shard_of = np.searchsorted(self.token_bases, index, side="right") - 1
        for shard in np.unique(shard_of):
            is_in_shard = shard_of == shard
            local_index = index[is_in_shard] - self.token_bases[shard]
            gathered[is_in_shard] = getattr(self.shards[shard], column)[local_index]
        return gathered

    def locate(self, document: int) -> tuple[int, int]:
        """Return the number of a document's data file, and its line there."""
        file = int(np.searchsorted(self.document_bases, document, side="right")) - 1
        return file, int(self.shards[file].lines[document - self.document_bases[file]])

    def log_prob(self) -> float | None:
        """Return Σ log_prob in nats, or None unless every record has one."""
        total = float(sum(np.sum(shard.log_prob) for shard in self.shards))
        return None if np.isnan(total) else total

    def rejected_lines(self, unused: list[list[tuple]]) -> list[list[str]]:
        """Return the lines of each file's ``.rejected.jsonl``.

        Args:
            unused: by file, the (line, reason) of records that were tokenised but are in no row.
        """
        by_file = zip(self.shards, unused, strict=True)
        return [[*shard.rejected_lines(), *(reject_line(*entry) for entry in entries)] for shard, entries in by_file]

    def publish_rejected(self, source: DataFiles, unused: list[list[tuple]], cache_dir: Path) -> list[str]:
        """Write each file's ``.rejected.jsonl`` (see ``rejected_lines``); return the paths of those that exist.

        The held-out side has its own file, ``<file>.valid.rejected.jsonl``; otherwise it would replace the training
        side's.
        """
        rejected_files = []
        for file, lines in zip(source.files, self.rejected_lines(unused), strict=True):
            if source.valid_ratio and source.side == "valid":
                file = file.with_name(f"{file.name}.valid")
            rejected_file = publish_rejected(file, lines, fallback_dir=cache_dir)
            if rejected_file:
                rejected_files.append(str(rejected_file))
        return rejected_files
