"""Decides which records are written, how often, and to which file. Reads only numbers, not texts.

All random choices follow from the seed and the hash of a record's content. So they depend neither on the order of the
records nor on the number of processes, and a record that is added changes no other one's number.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minillm.data.prepare.exact import first_equal
from minillm.data.prepare.near import find_near_duplicates, mix_bits
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.sources import Source
from minillm.data.prepare.store import RULES, Store
from minillm.errors import UserError

SAMPLE, ORDER = 1, 2  # purposes of random numbers
MAX_COPIES = 1000


@dataclass
class Choice:
    """The decision about each record that goes on after the first pass; arrays of (n_alive,).

    Attributes:
        rule: number of the rule that drops it, 0 if none does.
        copies: how often it is written to the training file.
        is_valid: whether it is held out.
        duplicate_of, similarity: the earlier record that it duplicates, or -1, and how similar they are.
        mixture: what the mixture does to each source; empty without shares.
    """

    rule: np.ndarray
    copies: np.ndarray
    is_valid: np.ndarray
    duplicate_of: np.ndarray
    similarity: np.ndarray
    mixture: list[dict] = field(default_factory=list)


def choose(
    store: Store, settings: PrepareSettings, sources: list[Source], source_of: np.ndarray, work_dir: Path
) -> Choice:
    """Return the decision: drop duplicates, then mix or sample, then split.

    Args:
        source_of: (n_alive,) index of each record's source; -1 for the records of ``--against``.
    """
    is_reference = source_of < 0
    rule = np.zeros(store.n_alive, np.uint8)
    duplicate_of, similarity = _exact(store, settings, is_reference, rule)
    if settings.near_duplicates == "drop":
        original, share = find_near_duplicates(store.signatures, rule == 0, settings.near_threshold, work_dir)
        is_near = (original >= 0) & ~is_reference
        rule[is_near] = RULES.index("near_duplicate")
        rule[is_near & is_reference[original]] = RULES.index("leaked")
        duplicate_of[is_near], similarity[is_near] = original[is_near], share[is_near]
    is_usable = (rule == 0) & ~is_reference
    copies = is_usable.astype(np.uint16)
    keys = random_keys(store.column("hash"), settings.seed, SAMPLE)
    sizes = np.asarray(store.column("size"), np.int64)
    mixture: list[dict] = []
    if sources[0].share is not None:
        mixture = _mix(copies, sizes, keys, sources, source_of, settings)
    elif settings.max_records:
        usable = np.flatnonzero(is_usable)
        copies[usable] = 0
        copies[usable[np.argsort(keys[usable], kind="stable")[: settings.max_records]]] = 1
    rule[is_usable & (copies == 0)] = RULES.index("not_sampled")
    is_valid = np.asarray(store.column("is_valid")) & (copies > 0)
    copies[is_valid] = 0
    return Choice(rule, copies, is_valid, duplicate_of, similarity, mixture)


def _exact(
    store: Store, settings: PrepareSettings, is_reference: np.ndarray, rule: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Set ``rule`` of the exact duplicates; return the first equal record of each, or -1, and the similarity."""
    first = first_equal(np.asarray(store.column("hash")))
    is_repeated = (first != np.arange(len(first))) & ~is_reference
    is_leaked = is_repeated & is_reference[first]  # the records of --against come first
    is_dropped = is_leaked | (is_repeated & (settings.exact_duplicates == "drop"))
    rule[is_dropped] = RULES.index("exact_duplicate")
    rule[is_leaked] = RULES.index("leaked")
    return np.where(is_dropped, first, -1), is_dropped.astype(np.float32)


def random_keys(hashes: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Return a random number, (n,) uint64, for each content hash."""
    start = mix_bits(np.array([seed ^ (purpose << 56)], np.uint64))
    return mix_bits(mix_bits(np.asarray(hashes["high"]) ^ start) ^ np.asarray(hashes["low"]))


def _mix(
    copies: np.ndarray,
    sizes: np.ndarray,
    keys: np.ndarray,
    sources: list[Source],
    source_of: np.ndarray,
    settings: PrepareSettings,
) -> list[dict]:
    """Set ``copies`` so that each source has its share of the size; return what was done to each source."""
    members = [np.flatnonzero((source_of == index) & (copies > 0)) for index in range(len(sources))]
    available = [int(sizes[records].sum()) for records in members]
    for source, size in zip(sources, available, strict=True):
        if not size:
            raise UserError(f"--data_path: no record of {source.name} is left, so it can have no share; see the table")
    totals = [size / source.share for source, size in zip(sources, available, strict=True)]
    ends = {"smallest": min, "largest": max}
    total = ends[settings.mix_size](totals) if settings.mix_size in ends else int(settings.mix_size)
    mixture = []
    for source, records, size in zip(sources, members, available, strict=True):
        n_whole, rest = divmod(round(total * source.share), size)
        if n_whole >= MAX_COPIES:
            raise UserError(
                f"--data_path: {source.name} would be repeated {n_whole:,} times, at most {MAX_COPIES:,} are allowed; "
                "give it a smaller share, or lower --mix_size"
            )
        chosen = choose_by_size(keys[records], sizes[records], rest)
        copies[records] = n_whole
        copies[records[chosen]] += 1
        written = n_whole * size + int(sizes[records[chosen]].sum())
        mixture.append({"source": source.name, "share": source.share, "available": size, "written": written})
    everything = sum(entry["written"] for entry in mixture)
    if not everything:
        raise UserError(f"--mix_size {settings.mix_size}: is less than half of any record, so nothing would be written")
    return [
        entry | {"written_share": entry["written"] / everything, "repeats": entry["written"] / entry["available"]}
        for entry in mixture
    ]


def choose_by_size(keys: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """Return the indices of records in the order of ``keys``, up to a total size as near to ``wanted`` as possible."""
    order = np.argsort(keys, kind="stable")
    totals = np.concatenate([[0], np.cumsum(sizes[order])])
    return order[: int(np.abs(totals - wanted).argmin())]
