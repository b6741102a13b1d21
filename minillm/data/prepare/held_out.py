"""Held-out records that share a passage with a training record: their loss measures what was learned by heart.

The rule is that of evaluation questions (``overlap.py``): a run of 13 units in a row, or the whole of a text of 8 to 12
units. System messages do not count, because many conversations begin with the same one.

    held out    0: a b c    1: b c d e       runs of 3 units   abc of 0   bcd of 1   cde of 1
    training    7: x b c d y                 has bcd, so 1 shares a passage with 7

Only the runs of held-out records are in memory, as hashes of 64 bits: about 40 bytes for each unit of held-out text.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from minillm.data.prepare.choose import Choice
from minillm.data.prepare.contents import texts_of
from minillm.data.prepare.near import mix_bits
from minillm.data.prepare.overlap import SHORTEST
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.store import RULES, Store
from minillm.data.prepare.units import split_units
from minillm.data.schema import parse_record
from minillm.terminal import progress


@dataclass(frozen=True, kw_only=True)
class SharedPassages:
    """What ``find_shared_passages`` found.

    Attributes:
        n_held_out, n_too_short: held-out records, and those of them without a text that is long enough to look for.
        hashes, owners: (n,) uint64 and int32, a run and the held-out record that it is of, sorted by hash.
        training_records: (n,) int32, the first training record with this run, or -1.
    """

    n_held_out: int
    n_too_short: int
    hashes: np.ndarray
    owners: np.ndarray
    training_records: np.ndarray

    @property
    def sharing(self) -> np.ndarray:
        """The held-out records that share a passage with a training record."""
        return np.unique(self.owners[self.training_records >= 0])

    def partner(self, record: int) -> tuple[int, float]:
        """Return the first training record that shares a passage with a record, and the share of its runs in any."""
        partners = self.training_records[self.owners == record]
        shared = partners[partners >= 0]
        return int(shared.min()), len(shared) / len(partners)


def treat_shared_passages(store: Store, choice: Choice, settings: PrepareSettings) -> dict:
    """Find the held-out records that share a passage with training, and drop or move them as ``valid_overlap`` says.

    Returns:
        Their number and what was done, for the report.
    """
    found = find_shared_passages(store, choice.is_valid, choice.copies > 0, ngram=settings.eval_ngram)
    sharing = found.sharing
    counts = {"held_out": found.n_held_out, "too_short": found.n_too_short, "sharing": len(sharing)}
    if settings.valid_overlap == "drop":
        choice.rule[sharing] = RULES.index("shared_passage")
        choice.is_valid[sharing] = False
        for record in sharing:
            choice.duplicate_of[record], choice.similarity[record] = found.partner(record)
    elif settings.valid_overlap == "move":
        counts["moved"] = 0
        while len(sharing):  # what is moved is a training record, and others may share a passage with it
            counts["moved"] += len(sharing)
            choice.is_valid[sharing] = False
            choice.copies[sharing] = 1
            is_new = np.zeros(store.n_alive, bool)
            is_new[sharing] = True
            sharing = find_shared_passages(store, choice.is_valid, is_new, ngram=settings.eval_ngram).sharing
    return counts


def find_shared_passages(
    store: Store, is_held_out: np.ndarray, is_training: np.ndarray, *, ngram: int
) -> SharedPassages:
    """Return the runs of ``ngram`` units of all held-out records, and which of them training records have.

    Args:
        is_held_out, is_training: (n_alive,) bool.
    """
    hashes, owners, lengths = [], [], set()
    n_held_out = n_too_short = 0
    for index, texts in _texts(store, is_held_out):
        n_held_out += 1
        long_texts = [units for units in texts if len(units) >= min(SHORTEST, ngram)]
        n_too_short += not long_texts
        runs = [hash_runs(units, min(ngram, len(units))) for units in long_texts]
        lengths |= {min(ngram, len(units)) for units in long_texts}
        hashes.append(np.unique(np.concatenate([*runs, np.zeros(0, np.uint64)])))
        owners.append(np.full(len(hashes[-1]), index, np.int32))
    all_hashes = np.concatenate([*hashes, np.zeros(0, np.uint64)])
    all_owners = np.concatenate([*owners, np.zeros(0, np.int32)])
    del hashes, owners
    order = np.argsort(all_hashes, kind="stable")
    all_hashes, all_owners = all_hashes[order], all_owners[order]
    training_records = np.full(len(order), -1, np.int32)
    for index, texts in _texts(store, is_training):
        runs = np.unique(np.concatenate([hash_runs(units, n) for units in texts for n in lengths] or [all_hashes[:0]]))
        starts, ends = (np.searchsorted(all_hashes, runs, side) for side in ("left", "right"))
        for start, end in zip(starts[starts < ends], ends[starts < ends], strict=True):
            if training_records[start] < 0:
                training_records[start:end] = index
    return SharedPassages(
        n_held_out=n_held_out,
        n_too_short=n_too_short,
        hashes=all_hashes,
        owners=all_owners,
        training_records=training_records,
    )


def hash_runs(units: list[str], n: int) -> np.ndarray:
    """Return a hash of each run of ``n`` units, (max(0, len(units) - n + 1),) uint64, equal in every process."""
    numbers = np.fromiter((zlib.crc32(unit.encode()) for unit in units), np.uint64, len(units))
    n_runs = max(0, len(units) - n + 1)
    hashes = np.full(n_runs, n, np.uint64)
    for offset in range(n):
        hashes = mix_bits(hashes ^ numbers[offset : offset + n_runs])
    return hashes


def _texts(store: Store, is_wanted: np.ndarray) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield (index, the units of each text but system messages) of the wanted ones of the records that go on."""
    index = -1
    with store.lines_path.open("rb") as lines:
        for rule, line in progress(zip(store.column("rule"), lines, strict=True), desc="comparing", unit=" records"):
            index += not rule
            if rule or not is_wanted[index]:
                continue
            record = parse_record(json.loads(line), 1)
            if record.messages:
                turns = [turn for turn in record.messages if turn["role"] != "system"]
                record = replace(record, messages=turns)
            yield index, [split_units(text) for text in texts_of(record)]
