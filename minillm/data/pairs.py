"""Rows for preference tuning: a chosen and a rejected reply (``PairRows``), or judged replies (``JudgedRows``).

Both replies of a pair are in one row, as two documents that never attend to each other. So one forward pass computes
the log-probabilities of both. The row contains the prompt twice:

    pairs           c c c c c r r r C C C R R R R R . .      c, r: chosen and rejected of one pair; C, R: of the next
    document_ids    0 0 0 0 0 1 1 1 2 2 2 3 3 3 3 3 - -      even: chosen, odd: rejected

A reply is never cut, because without its end it would be another reply. A record with a reply that is too long is
rejected.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.data.packing import PackedRows, Pieces, assemble, best_fit, check_max_seq_len
from minillm.data.sources.split import DataFiles
from minillm.data.turns import answer_turns
from minillm.errors import UserError

PACKINGS = ("best_fit", "none")


class _ReplyRows(PackedRows):
    """The base class of both: two documents per record, checked, and arranged in rows."""

    kind: str
    documents_per_row: int  # how many of a record's two documents the same row holds

    def __init__(
        self,
        path: str | Path | list | DataFiles,
        tokenizer,
        *,
        max_seq_len: int,
        packing: str = "best_fit",
        cache_dir: str | Path = "out/.token_cache",
        seed: int = 0,
        strict: bool = False,
    ):
        check_max_seq_len(max_seq_len)
        if packing not in PACKINGS:
            raise UserError(f"packing {packing!r} for replies: allowed are {', '.join(PACKINGS)}")
        source = DataFiles.of(path)
        store = TokenStore(tokenise_files(source, tokenizer, kind=self.kind, cache_dir=cache_dir, strict=strict))
        row_len = self.documents_per_row * max_seq_len
        fixed_len = None if packing == "none" else row_len
        super().__init__(store, tokenizer, source, max_seq_len=row_len, fixed_len=fixed_len)

        _, first, end = answer_turns(store)  # one reply per document
        length = end - 1  # in pairs; what follows a reply teaches nothing
        records, unused = self._check(first, length, max_seq_len, strict)
        if not len(records):
            line, reason = next(iter(filter(None, unused)))[0]
            raise UserError(
                f"no record of {', '.join(map(str, self.files))} can be used; the first, line {line}: {reason}; see "
                f"{', '.join(store.publish_rejected(source, unused, Path(cache_dir)))}"
            )
        documents = np.stack([2 * records, 2 * records + 1])  # (2, records)
        self._arrange(documents, length, packing, seed)
        self.n_targets, self.log_prob, self.target_bytes = float(len(records)), None, 0
        self.data_hash = self.hash_with(self.kind, max_seq_len, packing, seed)
        self.summary = self._summarise(
            "pairs" if self.kind == "preference" else "replies",
            unused=unused,
            cut=0,
            targets_lost=0,
            cache_dir=Path(cache_dir),
            documents_per_record=2,
        )

    def _check(self, first, length, max_seq_len: int, strict: bool) -> tuple[np.ndarray, list[list[tuple]]]:
        """Return the numbers of the usable records, and by file the (line, reason) of the others."""
        unused, usable = [[] for _ in self.files], []
        for record in range(self.store.n_documents // 2):
            one, two = 2 * record, 2 * record + 1
            longest = int(max(length[one], length[two]))
            reason = None
            if longest > max_seq_len:
                limits = f"--max_seq_len {max_seq_len} allows {max_seq_len + 1}: raise it"
                reason = f"{longest + 1} tokens with one reply, {limits}"
            elif not self._same_prompt(one, two, first):
                reason = (
                    "the prompts before the last turns of the two replies are not the same tokens; where replies have "
                    "several turns, only the last one may differ"
                )
            if reason is None:
                usable.append(record)
                continue
            file, line = self.store.locate(one)
            if strict:
                raise UserError(f"{self.files[file]}, line {line}: {reason}; leave the line out")
            unused[file].append((line, reason))
        return np.asarray(usable, np.int64), unused

    def _same_prompt(self, one: int, two: int, first: np.ndarray) -> bool:
        """Return whether the replies of two documents answer the same prompt.

        One reply may begin some tokens later than the other: a template may write an empty think block before it, or
        one token may join the end of the header and the white space at the beginning of the reply. But no turn may end
        between the common prompt and the reply.
        """
        common_len = min(first[one], first[two])
        prompts = []
        for document in (one, two):
            start = self.store.offsets[document]
            tokens = self.store.gather("tokens", np.arange(start, start + first[document]))
            if np.isin(tokens[common_len:], self.tokenizer.end_ids).any():
                return False
            prompts.append(tokens[:common_len])
        return np.array_equal(*prompts)

    def _pack_records(self, lengths: np.ndarray, packing: str, seed: int) -> np.ndarray:
        """Decide which records share a row: return the order of the records, and set where each row begins."""
        if packing == "none":
            self._record_starts = np.arange(len(lengths) + 1)
            return np.arange(len(lengths))
        order, self._record_starts = best_fit(lengths, self.max_seq_len, seed=seed)
        return order


def _whole_documents(documents: np.ndarray, length: np.ndarray) -> Pieces:
    return Pieces(documents, np.zeros(len(documents), np.int64), length[documents])


class PairRows(_ReplyRows):
    """Rows of pairs of replies: chosen, rejected, chosen, rejected, and so on.

    Args:
        path: files with preferences (``chosen``, ``rejected``); whatever ``expand_paths`` takes, or ``DataFiles``.
        max_seq_len: length of the longest conversation, prompt with one reply. A row holds two of this length, or more
            shorter ones.
        packing: "best_fit" fills rows with pairs; "none" gives each pair its own row.
        cache_dir, seed, strict: as for ``ChatRows``.

    ``n_targets`` counts pairs of replies.

    Raises:
        UserError: bad arguments or files, or no pair fits in a row.
    """

    kind, documents_per_row = "preference", 2

    def _arrange(self, documents: np.ndarray, length: np.ndarray, packing: str, seed: int) -> None:
        order = self._pack_records(length[documents].sum(axis=0), packing, seed)
        self._pieces = _whole_documents(documents[:, order].T.reshape(-1), length)
        self._row_starts = 2 * self._record_starts


class JudgedRows(_ReplyRows):
    """Rows of judged replies, for KTO. Each row has a second one: the same prompts with replies to other prompts.

    The columns of the second row begin with ``other_``: ``other_input_ids`` and so on. ``labels`` is 1 at every
    position of a good reply, else 0. A preference counts as a good reply and a bad one.

    The arguments are those of ``PairRows``; a row holds one conversation of ``max_seq_len``, or more shorter ones.
    ``n_targets`` counts replies.
    """

    kind, documents_per_row = "judged", 1

    def _arrange(self, documents: np.ndarray, length: np.ndarray, packing: str, seed: int) -> None:
        order = self._pack_records(length[documents].max(axis=0), packing, seed)  # so that the second row fits too
        documents = documents[:, order]
        self._pieces, self._other_pieces = (_whole_documents(side, length) for side in documents)
        self._row_starts = self._record_starts
        labels = np.concatenate([shard.label for shard in self.store.shards])
        self._labels = labels[documents[0]].astype(np.int64)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        columns = super().__getitem__(row)
        in_row = slice(self._row_starts[row], self._row_starts[row + 1])
        columns["labels"] = np.repeat(self._labels[in_row], self._pieces.length[in_row])
        other_columns = assemble(self.store, self._other_pieces.take(in_row))
        return columns | {f"other_{name}": column for name, column in other_columns.items()}


def count_pairs(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of pairs in a batch of ``PairRows`` (float64 scalar): the denominator of their losses."""
    return count_replies(batch) / 2


def count_replies(batch: dict[str, Tensor]) -> Tensor:
    """Return the number of judged replies in a batch of ``JudgedRows`` (float64 scalar)."""
    return count_documents(batch["document_ids"]).sum().to(torch.float64)


def count_documents(document_ids: Tensor) -> Tensor:
    """Return the number of documents of each row, (B,), from ``document_ids`` (B, T)."""
    return document_ids.amax(dim=1) + 1
