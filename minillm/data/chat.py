"""Fine-tuning rows: conversations, with the assistant's turns as targets.

Which turns are targets (``train_on``):

- "all": every assistant turn of a conversation, in one row.
- "per_turn": one piece per assistant turn, with the history as context and that turn alone as target. Since
  attention is causal, a turn's predictions are the same in both, so the sums of loss and gradients are equal;
  "all" needs one pass over the conversation where "per_turn" needs one per turn.
- "last": the last turn only. Another objective: earlier turns are context and teach nothing.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.shards import TokenStore, prepare
from minillm.data.packing import NO_LIMIT, PackedRows, Pieces, check_max_seq_len
from minillm.data.sources.split import DataFiles
from minillm.data.turns import answer_turns
from minillm.errors import UserError

PACKINGS = ("best_fit", "none")
TRAIN_ON = ("all", "last", "per_turn")


class ChatRows(PackedRows):
    """Rows of conversations.

    Args:
        path: files with conversations (any chat schema); whatever ``expand_paths`` takes, or ``DataFiles`` (one side of
            a split, other names for keys).
        max_seq_len: row length T in pairs. A longer conversation is cut there; one that has no target left is
            rejected with its line number.
        train_on: "all", "last" or "per_turn", see above.
        packing: "best_fit" fills rows with conversations that fit, which never see each other; "none" gives
            each a row of its own.
        cache_dir: where tokenised files are kept (the same for every train_on and packing).
        seed: of the packing. strict: a bad line, or a conversation without target within T, is fatal.

    What follows a conversation's last target is left out of the row: nothing would be learned from it.
    ``target_bytes`` counts the targets' UTF-8 bytes, control tokens 0. Raises UserError for bad arguments and
    files (see ``prepare``).
    """

    kind = "chat"  # of shard

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
        store = TokenStore(prepare(source, tokenizer, kind=self.kind, cache_dir=cache_dir, strict=strict))
        fixed_len = None if packing == "none" else max_seq_len
        super().__init__(store, tokenizer, source, max_seq_len=max_seq_len, fixed_len=fixed_len)

        document, first, end = answer_turns(store)
        is_last = np.append(document[1:] != document[:-1], True)
        # Token index t is the target of pair t - 1, which is in the row when t <= T.
        reachable = first <= max_seq_len
        has_target = np.zeros(store.n_documents, bool)
        has_target[document[reachable & is_last if train_on == "last" else reachable]] = True
        # Of a usable conversation, those of its targets that lie beyond the row are lost; a rejected one is not cut.
        is_wanted = has_target[document] & (is_last if train_on == "last" else True)
        n_cut = int(np.count_nonzero(is_wanted & is_last & (end - 1 > max_seq_len)))
        lost = self._explain_lost(np.flatnonzero(~has_target), self.files, strict)

        pieces, self.n_targets = _choose(document, first, end, is_last, max_seq_len, train_on)
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
            set_aside=lost,
            cut=n_cut,
            targets_lost=int((end - first)[is_wanted].sum() - self.n_targets),
            cache_dir=Path(cache_dir),
        )

    def _explain_lost(self, documents: np.ndarray, files: list[Path], strict: bool) -> list[list[tuple]]:
        lost: list[list[tuple]] = [[] for _ in files]
        reason = f"no target within --max_seq_len {self.max_seq_len}: the prompt alone fills the row"
        bases = self.store.document_bases
        for document in documents:
            file = int(np.searchsorted(bases, document, side="right")) - 1
            line = int(self.store.shards[file].lines[document - bases[file]])
            if strict:
                raise UserError(f"{files[file]}, line {line}: {reason}; raise it or leave the line out")
            lost[file].append((line, reason))
        return lost

    @cached_property
    def target_bytes(self) -> int:
        """UTF-8 bytes of all targets' text; control tokens count 0."""
        control = getattr(self.tokenizer, "special_ids", frozenset())
        n_bytes = [0 if i in control else len(self.tokenizer.token_bytes(i)) for i in range(len(self.target_counts))]
        return int(self.target_counts @ np.asarray(n_bytes))


def _choose(document, first, end, is_last, max_seq_len: int, train_on: str) -> tuple[Pieces, float]:
    """Return the pieces to learn from, and how many targets they hold."""
    kept_end = np.minimum(end, max_seq_len + 1)  # a cut turn loses its tail
    n_targets = np.maximum(kept_end - first, 0)
    if train_on == "per_turn":
        chosen = first <= max_seq_len
        limits = (first[chosen], kept_end[chosen])
    elif train_on == "last":
        chosen = is_last & (first <= max_seq_len)
        limits = (first[chosen], kept_end[chosen])
    else:
        # A document's pieces end at its last turn that begins within the row; masks do the rest.
        reachable = np.flatnonzero(first <= max_seq_len)
        follows = np.append(document[reachable][1:] != document[reachable][:-1], True)[: len(reachable)]
        chosen = reachable[follows]
        limits = (np.zeros(len(chosen), np.int64), np.full(len(chosen), NO_LIMIT))
        return Pieces(document[chosen], limits[0], kept_end[chosen] - 1, *limits), float(n_targets.sum())
    zeros = np.zeros(len(limits[0]), np.int64)
    return Pieces(document[chosen], zeros, kept_end[chosen] - 1, *limits), float(n_targets[chosen].sum())
