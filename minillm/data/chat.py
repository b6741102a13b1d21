"""Fine-tuning rows: conversations, with the assistant's turns as targets.

``train_on`` says which turns are targets:

- "all": every assistant turn of a conversation, in one row.
- "per_turn": one piece per assistant turn, with the earlier turns as context and only this turn as target. Attention
  is causal, so a turn's predictions are the same as with "all", and the sums of loss and gradients are equal. But "all"
  needs one pass over the conversation, "per_turn" one for each turn.
- "last": only the last turn. This is another objective: the earlier turns are only context.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.data.packing import NO_LIMIT, PackedRows, Pieces, check_max_seq_len
from minillm.data.sources.split import DataFiles
from minillm.data.turns import answer_turns
from minillm.errors import UserError

PACKINGS = ("best_fit", "none")
TRAIN_ON = ("all", "last", "per_turn")


class ChatRows(PackedRows):
    """Rows of conversations.

    Args:
        path: files with conversations (any chat schema); whatever ``expand_paths`` takes, or ``DataFiles``.
        max_seq_len: row length T in pairs. A longer conversation is cut; if no target is left, it is rejected with its
            line number.
        train_on: "all", "last" or "per_turn", see above.
        packing: "best_fit" fills rows with conversations that fit, which never attend to each other; "none" gives each
            its own row.
        cache_dir: directory of tokenised files (one for every ``train_on`` and ``packing``).
        seed: of the packing.
        strict: a bad line, or a conversation without a target within T, is an error.

    A row does not contain what follows a conversation's last target: it would teach nothing. ``target_bytes`` counts
    the targets' UTF-8 bytes; control tokens count 0.

    Raises:
        UserError: bad arguments or files, as in ``tokenise_files``.
    """

    kind = "chat"  # of the shards

    def __init__(
        self,
        path: str | Path | list | DataFiles,
        tokenizer,
        *,
        max_seq_len: int,
        train_on: str = "all",
        packing: str = "best_fit",
        cache_dir: str | Path = "out/.token_cache",
        seed: int = 0,
        strict: bool = False,
    ):
        check_max_seq_len(max_seq_len)
        if packing not in PACKINGS:
            raise UserError(f"packing {packing!r} for conversations: allowed are {', '.join(PACKINGS)}")
        if train_on not in TRAIN_ON:
            raise UserError(f"train_on {train_on!r}: allowed are {', '.join(TRAIN_ON)}")
        source = DataFiles.of(path)
        store = TokenStore(tokenise_files(source, tokenizer, kind=self.kind, cache_dir=cache_dir, strict=strict))
        fixed_len = None if packing == "none" else max_seq_len
        super().__init__(store, tokenizer, source, max_seq_len=max_seq_len, fixed_len=fixed_len)

        # Each entry is an answer: tokens [first, end) of its document. Token t is the target of pair t - 1, which is
        # in the row if t <= T.
        document, first, end = answer_turns(store)
        is_last = np.append(document[1:] != document[:-1], True)
        is_trained = is_last if train_on == "last" else np.ones(len(document), bool)
        has_target = np.zeros(store.n_documents, bool)
        has_target[document[is_trained & (first <= max_seq_len)]] = True
        unused = self._unused_records(np.flatnonzero(~has_target), strict)
        # Usable conversations lose their targets beyond the row; a rejected conversation does not count as cut.
        is_trained &= has_target[document]
        n_cut = int(np.count_nonzero(is_trained & is_last & (end - 1 > max_seq_len)))

        pieces, self.n_targets = _choose_pieces(document, first, end, is_last, max_seq_len, train_on)
        if not len(pieces.length):
            raise UserError(
                f"no conversation of {', '.join(map(str, self.files))} has a target within --max_seq_len "
                f"{max_seq_len}: raise it"
            )
        self.set_pieces(pieces, packing, seed)
        self.log_prob = store.log_prob() if train_on != "last" and has_target.all() and not n_cut else None
        self.data_hash = self.hash_with(self.kind, max_seq_len, packing, train_on, seed)
        self.summary = self._summarise(
            "conversations",
            unused=unused,
            cut=n_cut,
            targets_lost=int((end - first)[is_trained].sum() - self.n_targets),
            cache_dir=Path(cache_dir),
        )

    def _unused_records(self, documents: np.ndarray, strict: bool) -> list[list[tuple]]:
        """Return, by file, the (line, reason) of the documents without a target."""
        unused: list[list[tuple]] = [[] for _ in self.files]
        reason = f"no target within --max_seq_len {self.max_seq_len}: the prompt alone fills the row"
        for document in documents:
            file, line = self.store.locate(document)
            if strict:
                raise UserError(f"{self.files[file]}, line {line}: {reason}; raise it or leave the line out")
            unused[file].append((line, reason))
        return unused

    @cached_property
    def target_bytes(self) -> int:
        """UTF-8 bytes of all targets' text; control tokens count 0."""
        control_ids = getattr(self.tokenizer, "special_ids", frozenset())
        n_bytes = [
            0 if token_id in control_ids else len(self.tokenizer.token_bytes(token_id))
            for token_id in range(len(self.target_counts))
        ]
        return int(self.target_counts @ np.asarray(n_bytes))


def _choose_pieces(document, first, end, is_last, max_seq_len: int, train_on: str) -> tuple[Pieces, float]:
    """Return the pieces to train on, and the number of their targets."""
    is_reachable = first <= max_seq_len  # the answer begins within the row
    end_in_row = np.minimum(end, max_seq_len + 1)
    if train_on == "all":
        # One piece per document, up to its last reachable answer; all answers in it are targets.
        reachable = np.flatnonzero(is_reachable)
        is_last_reachable = np.append(document[reachable][1:] != document[reachable][:-1], True)[: len(reachable)]
        chosen = reachable[is_last_reachable]
        first_target, end_target = np.zeros(len(chosen), np.int64), np.full(len(chosen), NO_LIMIT)
        n_targets = np.maximum(end_in_row - first, 0).sum()
    else:
        # One piece per answer ("per_turn"), or for the last answer; only this answer is a target.
        chosen = np.flatnonzero(is_reachable & is_last if train_on == "last" else is_reachable)
        first_target, end_target = first[chosen], end_in_row[chosen]
        n_targets = (end_target - first_target).sum()
    start = np.zeros(len(chosen), np.int64)
    return Pieces(document[chosen], start, end_in_row[chosen] - 1, first_target, end_target), float(n_targets)
