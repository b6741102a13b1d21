"""Chapter 25: MinHash by hand and by the package that the library uses, and the S-curve, next to their formulas."""

import numpy as np

from minillm.data.prepare.near import N_HASHES, candidate_probability, check_package, choose_bands, shingles, signature
from minillm.data.prepare.units import split_units

check_package()

# 1. By hand: two texts that differ in one word, and ten thousand random orders of their shingles.
text = "the small cat sat on the old red mat near the door and looked at the rain that fell outside"
first, second = (shingles(split_units(version)) for version in (text, text.replace("near", "by")))
union = sorted(first | second)
in_first, in_second = (np.array([shingle in side for shingle in union]) for side in (first, second))
rng = np.random.default_rng(0)
places = np.stack([rng.permutation(len(union)) for _ in range(10_000)])  # (orders, shingles): the place of each
equal = places[:, in_first].min(axis=1) == places[:, in_second].min(axis=1)
print(f"shingles: {len(first)} and {len(second)}, shared {len(first & second)}, together {len(union)}")
print(f"Jaccard index: {len(first & second) / len(union):.4f}")
print(f"orders in which both begin with the same shingle: {equal.mean():.4f}")

# 2. 128 numbers per record, in 18 bands of 7: independent orders by hand, and the package that the library uses.
n_bands, n_rows = choose_bands(0.8)
print(f"numbers per record: {N_HASHES}, bands: {n_bands}, rows per band: {n_rows}")
print(f"middle of the curve, (1/b)^(1/r): {(1 / n_bands) ** (1 / n_rows):.4f}")


def agree(first: np.ndarray, second: np.ndarray) -> tuple[float, bool]:
    """Return the share of equal numbers of two signatures, (128,), and whether a band is equal."""
    is_equal = first == second
    bands = is_equal[: n_bands * n_rows].reshape(n_bands, n_rows)
    return is_equal.mean(), bands.all(axis=1).any()


for percent in (50, 60, 70, 80, 90):  # of 100 shingles together, so many are shared; each side has half of the others
    s, half = percent / 100, (100 - percent) // 2
    first, second = np.r_[: percent + half], np.r_[:percent, percent + half : 100]  # shingles by their number
    by_hand, by_package = [], []
    for pair in range(1000):
        numbers = rng.random((N_HASHES, 100), dtype=np.float32)  # an order in each row
        by_hand.append(agree(numbers[:, first].min(axis=1), numbers[:, second].min(axis=1)))
        by_package.append(agree(*(signature({f"{pair}-{n}" for n in side}) for side in (first, second))))
    print(f"similarity {s}, formula: {candidate_probability(s, n_bands, n_rows):.4f} meet")
    for name, pairs in (("by hand", by_hand), ("package", by_package)):
        estimates, is_met = map(np.array, zip(*pairs, strict=True))
        print(f"similarity {s}, {name}: {is_met.mean():.4f} meet, estimate {estimates.mean():.4f}")
        if percent == 80:
            print(f"deviation of the estimate, {name}: {estimates.std():.4f}")
print(f"deviation of the estimate, formula: {(0.8 * 0.2 / N_HASHES) ** 0.5:.4f}")
