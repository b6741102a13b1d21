"""Near duplicates by MinHash with locality-sensitive hashing (Broder 1997; Mining of Massive Datasets, chapter 3).

The similarity of two records is the Jaccard index of their shingles (runs of 5 units, ``units.py``):

    J(a, b) = |a ∩ b| / |a ∪ b|

A signature has 128 numbers, each the minimum of a hash function over the shingles. Two signatures agree in a share J of
their numbers, with a standard deviation of about sqrt(J(1 - J)/128), 0.035 at 0.8 (less for short texts, because the
numbers of rensa are not independent). To find the pairs without comparing all, the signature is cut into bands, and
only records with an equal band are compared:

    P(some band of r rows is equal, of b bands) = 1 - (1 - J^r)^b        98.5 % at 0.8 with b = 18, r = 7

Records are taken in order. One that is similar to an earlier *kept* record is dropped, all others are kept. So each
dropped record is itself similar to a kept one; there are no chains.

In memory are two numbers per record; signatures and bands lie on disk.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minillm.data.prepare.arrays import new_array, release_memory
from minillm.errors import missing_package

N_HASHES = 128  # numbers of a signature
SHINGLE = 5  # units
SEED = 1
MIN_RECALL = 0.98  # of the banding, at the threshold
CHUNK = 1 << 14  # records read at once
RANDOM_CHUNK = 1 << 7  # the same, where each touches pages of the arrays at random
ALONE = 2**32 - 1  # in place of a bucket: no other record has the same band


def check_package() -> None:
    """Raise ``UserError`` if the package that computes signatures is not installed."""
    try:
        import rensa  # noqa: F401
    except ImportError:
        raise missing_package("rensa", purpose="--near_duplicates", extra="data") from None


def shingles(units: list[str]) -> set[str]:
    """Return the runs of ``SHINGLE`` units; a shorter text is one shingle, a text without units has none."""
    if len(units) < SHINGLE:
        return {" ".join(units)} if units else set()
    return {" ".join(units[start : start + SHINGLE]) for start in range(len(units) - SHINGLE + 1)}


def signature(shingle_set: set[str]) -> np.ndarray:
    """Return the signature, (N_HASHES,) uint32, of a set of shingles; zeros for an empty set: it resembles no other."""
    import rensa

    if not shingle_set:
        return np.zeros(N_HASHES, np.uint32)
    sketch = rensa.RMinHash(num_perm=N_HASHES, seed=SEED)
    sketch.update(list(shingle_set))
    return np.asarray(sketch.digest(), np.uint32)


def candidate_probability(similarity: float, n_bands: int, n_rows: int) -> float:
    """Return the probability that two records of this similarity have an equal band."""
    return 1 - (1 - similarity**n_rows) ** n_bands


def choose_bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows per band): the most rows with which a share ``MIN_RECALL`` of such pairs is found."""
    for n_rows in range(N_HASHES // 2, 0, -1):
        n_bands = N_HASHES // n_rows
        if candidate_probability(threshold, n_bands, n_rows) >= MIN_RECALL:
            return n_bands, n_rows
    return N_HASHES, 1


def find_near_duplicates(
    signatures: np.ndarray, is_alive: np.ndarray, threshold: float, work_dir: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept record that each record resembles, (n,) int64, or -1; and their similarity, (n,) float32.

    Args:
        signatures: (n, N_HASHES) uint32, usually a memory map.
        is_alive: (n,) bool; other records are left out.
        work_dir: takes 20 bytes per record and band.
    """
    n = len(signatures)
    n_bands, n_rows = choose_bands(threshold)
    original, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float32)
    if n < 2:
        return original, similarity
    is_alive = is_alive & _has_shingles(signatures)
    # For each band: the records sorted by their band's hash, so that equal ones lie together ("a bucket"), and for each
    # record where its bucket begins.
    members = new_array(work_dir / "members.bin", (n_bands, n), np.uint32)
    buckets = new_array(work_dir / "buckets.bin", (n_bands, n), np.uint32)
    n_kept = new_array(work_dir / "n_kept.bin", (n_bands, n), np.uint32)
    hashes = new_array(work_dir / "band_hashes.bin", (n_bands, n), np.uint64)
    _hash_bands(signatures, hashes, n_rows)
    has_bucket = np.zeros(n, bool)
    for band in range(n_bands):
        members[band], buckets[band] = _sort_into_buckets(hashes[band], is_alive)
        has_bucket |= buckets[band] != ALONE
        release_memory(hashes, members, buckets)
    for record, other, share in _drop_in_order(
        signatures, members, buckets, n_kept, np.flatnonzero(has_bucket), threshold
    ):
        original[record], similarity[record] = other, share
    return original, similarity


def _has_shingles(signatures: np.ndarray) -> np.ndarray:
    """Return whether each record, (n,) bool, has any shingle."""
    has_shingles = np.zeros(len(signatures), bool)
    for start in range(0, len(signatures), CHUNK):
        has_shingles[start : start + CHUNK] = signatures[start : start + CHUNK].any(axis=1)
        release_memory(signatures)
    return has_shingles


def _hash_bands(signatures: np.ndarray, hashes: np.ndarray, n_rows: int) -> None:
    """Write the hash of each band of each signature into ``hashes``, (bands, n) uint64."""
    for start in range(0, len(signatures), CHUNK):
        chunk = np.asarray(signatures[start : start + CHUNK], np.uint64)
        for band in range(len(hashes)):
            mixed = np.zeros(len(chunk), np.uint64)
            for column in chunk[:, band * n_rows : (band + 1) * n_rows].T:
                mixed = mix_bits(mixed ^ column)
            hashes[band, start : start + CHUNK] = mixed
        release_memory(signatures, hashes)


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64: a hash of uint64 numbers, equal on every machine."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _sort_into_buckets(hashes: np.ndarray, is_alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the records by hash, alive ones first, (n,); and where each one's bucket begins, (n,), or ALONE."""
    n = len(hashes)
    alive = np.flatnonzero(is_alive)
    order = alive[np.argsort(hashes[alive], kind="stable")]
    sorted_hashes = hashes[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = sorted_hashes[1:] != sorted_hashes[:-1]
    starts = np.flatnonzero(is_new)
    sizes = np.diff(np.append(starts, len(order)))
    buckets = np.full(n, ALONE, np.uint32)
    buckets[order] = np.repeat(np.where(sizes > 1, starts, ALONE), sizes)
    return np.append(order, np.zeros(n - len(order), order.dtype)).astype(np.uint32), buckets


def _drop_in_order(
    signatures: np.ndarray,
    members: np.ndarray,
    buckets: np.ndarray,
    n_kept: np.ndarray,
    records: np.ndarray,
    threshold: float,
) -> Iterator[tuple[int, int, float]]:
    """Yield (record, the kept record that it resembles, similarity) of the near duplicates among ``records``, in order.

    A kept record is written to the front of its buckets, where later ones meet it.

    ``n_kept`` (bands, n) counts the kept records of each bucket, at the place where the bucket begins.
    """
    for start in range(0, len(records), RANDOM_CHUNK):
        chunk = records[start : start + RANDOM_CHUNK]
        for record, bucket_starts in zip(chunk.tolist(), np.asarray(buckets[:, chunk]).T.tolist(), strict=True):
            places = [(band, place) for band, place in enumerate(bucket_starts) if place != ALONE]
            met = [members[band, place : place + n_kept[band, place]] for band, place in places]
            candidates = np.unique(np.concatenate(met))
            if len(candidates):
                shares = (signatures[candidates] == signatures[record]).mean(axis=1)
                best = int(shares.argmax())  # the earliest one of the most similar
                if shares[best] >= threshold:
                    yield record, int(candidates[best]), float(shares[best])
                    continue
            for band, place in places:
                members[band, place + n_kept[band, place]] = record
                n_kept[band, place] += 1
        release_memory(signatures, members, buckets, n_kept)
