"""Near duplicates: recall and precision on pairs of known similarity, and the greedy rule as a slow loop."""

import random

import numpy as np
import pytest

pytest.importorskip("rensa")

from minillm.data.prepare.near import (
    MIN_RECALL,
    N_HASHES,
    candidate_probability,
    choose_bands,
    find_near_duplicates,
    shingles,
    signature,
)


def pair(number: int, similarity: float, size: int = 300) -> tuple[set[str], set[str], float]:
    """Return two sets of about this Jaccard index, and their exact one."""
    n_shared = round(2 * size * similarity / (1 + similarity))
    shared = {f"{number}-{i}" for i in range(n_shared)}
    sets = [shared | {f"{number}-{side}-{i}" for i in range(size - n_shared)} for side in "ab"]
    return *sets, len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_jaccard_index():
    errors = []
    for number in range(100):
        a, b, exact = pair(number, 0.8)
        errors.append((signature(a) == signature(b)).mean() - exact)
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 1.5 * (exact * (1 - exact) / N_HASHES) ** 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_are_the_widest_with_the_recall(threshold):
    n_bands, n_rows = choose_bands(threshold)
    assert n_bands * n_rows <= N_HASHES
    assert candidate_probability(threshold, n_bands, n_rows) >= MIN_RECALL
    if threshold < 1:
        wider = n_rows + 1
        assert candidate_probability(threshold, N_HASHES // wider, wider) < MIN_RECALL


def test_the_probability_is_that_of_the_closed_form_by_simulation():
    rng, similarity, n_bands, n_rows = np.random.default_rng(0), 0.6, 10, 3
    equal = rng.random((20_000, n_bands, n_rows)) < similarity
    assert equal.all(axis=2).any(axis=1).mean() == pytest.approx(
        candidate_probability(similarity, n_bands, n_rows), abs=0.015
    )


@pytest.mark.parametrize("similarity, least, most", [(0.95, 0.99, 1), (0.88, 0.93, 1), (0.72, 0, 0.07), (0.5, 0, 0)])
def test_recall_and_precision_at_known_similarities(tmp_path, similarity, least, most):
    """At the threshold of 0.8; the standard deviation of an estimate there is 0.035."""
    n_pairs = 150
    sides = [side for number in range(n_pairs) for side in pair(number, similarity)[:2]]
    signatures = np.stack([signature(side) for side in sides])
    found = find(signatures, np.ones(len(sides), bool), 0.8, tmp_path)
    assert least <= len(found) / n_pairs <= most
    assert all(record == original + 1 and record % 2 for record, (original, _) in found.items())


def find(*arguments) -> dict[int, tuple[int, float]]:
    """Return {record: (the kept record that it resembles, similarity)}."""
    originals, similarities = find_near_duplicates(*arguments)
    return {int(i): (int(originals[i]), float(similarities[i])) for i in np.flatnonzero(originals >= 0)}


def slow_greedy(signatures: np.ndarray, is_alive: np.ndarray, threshold: float) -> set[int]:
    """Compare each record with every kept one that has an equal band."""
    n_bands, n_rows = choose_bands(threshold)
    kept, dropped = [], set()
    for record in np.flatnonzero(is_alive & signatures.any(axis=1)):
        for other in kept:
            equal = signatures[record] == signatures[other]
            has_equal_band = equal[: n_bands * n_rows].reshape(n_bands, n_rows).all(axis=1).any()
            if has_equal_band and equal.mean() >= threshold:
                dropped.add(int(record))
                break
        else:
            kept.append(record)
    return dropped


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_kept_records_are_those_of_the_slow_loop(tmp_path, monkeypatch, threshold):
    """Families of texts that drift word by word: many are similar, in chains."""
    monkeypatch.setattr("minillm.data.prepare.near.CHUNK", 7)
    monkeypatch.setattr("minillm.data.prepare.near.RANDOM_CHUNK", 5)
    rng, texts = random.Random(3), []
    for _ in range(12):
        words = [str(rng.randrange(10**6)) for _ in range(80)]
        for _ in range(12):
            words = list(words)
            words[rng.randrange(80)] = "x" + str(rng.randrange(10**6))
            texts.append(words)
    rng.shuffle(texts)
    signatures = np.stack([signature(shingles(words)) for words in texts] + [signature(set())] * 3)
    is_alive = np.array([rng.random() < 0.9 for _ in signatures])
    found = find(signatures, is_alive, threshold, tmp_path)
    assert set(found) == slow_greedy(signatures, is_alive, threshold)
    assert 20 < len(found) < 130
    for record, (original, similarity) in found.items():
        assert original < record
        assert original not in found
        assert similarity == (signatures[record] == signatures[original]).mean() >= threshold


def test_shingles_of_short_texts():
    assert shingles([]) == set()
    assert shingles(["a", "b"]) == {"a b"}
    assert shingles(list("abcdef")) == {"a b c d e", "b c d e f"}
    assert not signature(set()).any()
    assert signature({"a"}).any()


def test_few_records(tmp_path):
    one = np.stack([signature({"a"})])
    assert find(one[:0], np.ones(0, bool), 0.8, tmp_path) == {}
    assert find(one, np.ones(1, bool), 0.8, tmp_path) == {}
    assert find(one[[0, 0, 0]], np.array([1, 0, 1], bool), 0.8, tmp_path) == {2: (0, 1.0)}
