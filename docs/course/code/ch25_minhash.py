"""Chapter 25: MinHash by hand, the library's estimate, and the S-curve of its bands, next to their formulas."""

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

# 2. The library: 128 numbers per record, 18 bands of 7.
n_bands, n_rows = choose_bands(0.8)
print(f"numbers per record: {N_HASHES}, bands: {n_bands}, rows per band: {n_rows}")
print(f"middle of the curve, (1/b)^(1/r): {(1 / n_bands) ** (1 / n_rows):.4f}")
n_pairs = 1000
for percent in (50, 60, 70, 80, 90):  # of 100 shingles together, so many are shared; each side has half of the others
    estimates, is_met = [], []
    for pair in range(n_pairs):
        names = [f"{pair}-{n}" for n in range(100)]
        shared, rest = names[:percent], names[percent:]
        half = len(rest) // 2
        sides = (set(shared + rest[:half]), set(shared + rest[half:]))
        is_equal = signature(sides[0]) == signature(sides[1])  # (128,)
        estimates.append(is_equal.mean())
        is_met.append(is_equal[: n_bands * n_rows].reshape(n_bands, n_rows).all(axis=1).any())
    s = percent / 100
    print(
        f"similarity {s}: formula {candidate_probability(s, n_bands, n_rows):.4f}, found {np.mean(is_met):.4f}; "
        f"estimate {np.mean(estimates):.4f} with deviation {np.std(estimates):.4f}, "
        f"formula {(s * (1 - s) / N_HASHES) ** 0.5:.4f}"
    )
