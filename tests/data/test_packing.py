import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import packing
from minillm.data.cache.shards import TokenStore
from minillm.data.cache.tokenise import tokenise_files
from minillm.data.packing import Pieces, assemble, best_fit, check_max_seq_len, cut_long
from minillm.errors import UserError


def rows_of(lengths, capacity, seed=0):
    order, starts = best_fit(np.asarray(lengths, np.int64), capacity, seed=seed)
    return [order[a:b].tolist() for a, b in pairwise(starts)]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 5))
def test_best_fit_places_every_item_once_and_overfills_nothing(lengths, seed):
    rows = rows_of(lengths, 20, seed)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= 20 for row in rows)
    # the bound of best-fit decreasing: at most 11/9 of the optimum plus 4, the optimum being at least the volume
    assert len(rows) <= 11 / 9 * max(1, -(-sum(lengths) // 20)) + 4 or min(lengths) > 20 / 3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_best_fit_equals_the_obvious_search(lengths):
    """Row by row the same free places as a plain scan for the fullest row that fits."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [f for f in free if f >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(12 - length)
    rows = rows_of(lengths, 12)
    assert sorted(12 - sum(lengths[i] for i in row) for row in rows) == sorted(free)


def test_best_fit_is_a_function_of_the_seed():
    lengths = np.random.default_rng(0).integers(1, 30, 300)
    assert rows_of(lengths, 64, 1) == rows_of(lengths, 64, 1) != rows_of(lengths, 64, 2)


def test_best_fit_of_100k_conversations_takes_seconds_and_fills_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(int), 1, 1024)
    began = time.process_time()
    order, starts = best_fit(lengths, 1024)
    assert time.process_time() - began < 5
    assert len(order) == 100_000
    assert lengths.sum() / (1024 * (len(starts) - 1)) > 0.99


def test_best_fit_window_by_window(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 7)
    lengths = np.random.default_rng(0).integers(1, 9, 50)
    rows = rows_of(lengths, 16)
    assert sorted(i for row in rows for i in row) == list(range(50))
    assert all(len({i // 7 for i in row}) == 1 for row in rows)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 12))
def test_cut_long_throws_nothing_away(n_pairs, capacity):
    pieces = cut_long(np.array(n_pairs), capacity)
    assert pieces.length.max() <= capacity
    covered = [(d, s + i) for d, s, n in zip(*pieces[:3], strict=True) for i in range(n)]
    assert covered == [(d, i) for d, n in enumerate(n_pairs) for i in range(n)]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_assemble_draws_the_shift(data):
    """The picture of the module, for any pieces of any documents."""
    store = FakeStore([list(range(100 * d, 100 * d + n)) for d, n in enumerate([2, 9, 5, 17])])
    chosen = []
    for d in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6)):
        n_pairs = len(store.documents[d]) - 1
        start = data.draw(st.integers(0, n_pairs - 1))
        chosen.append((d, start, data.draw(st.integers(1, n_pairs - start))))
    row = assemble(store, Pieces(*np.array(chosen).T))
    expected = [
        (store.documents[d][s + i], store.documents[d][s + i + 1], i, number)
        for number, (d, s, n) in enumerate(chosen)
        for i in range(n)
    ]
    names = ("input_ids", "targets", "position_ids", "document_ids")
    assert list(zip(*(row[name].tolist() for name in names), strict=True)) == expected
    assert all(column.dtype == np.int64 for column in row.values())


class FakeStore:
    has_mask = False

    def __init__(self, documents):
        self.documents = documents
        self.offsets = np.cumsum([0] + [len(d) for d in documents])
        self.tokens = np.concatenate(documents)

    def gather(self, column, index):
        return self.tokens[index]


def test_assemble_keeps_masked_targets_only(write, talks, tokenizer, tmp_path):
    path = write("a.jsonl", [{"messages": talk} for talk in talks])
    store = TokenStore(tokenise_files(path, tokenizer, kind="chat", cache_dir=tmp_path))
    n_pairs = np.diff(store.offsets) - 1
    number = int(np.argmax(n_pairs))
    whole = Pieces(np.array([number]), np.array([0]), n_pairs[[number]])
    here = slice(store.offsets[number], store.offsets[number + 1])
    tokens, mask = store.shards[0].tokens[here].astype(int), store.shards[0].mask[here]
    row = assemble(store, whole)
    assert row["input_ids"].tolist() == tokens[:-1].tolist()
    assert row["targets"].tolist() == np.where(mask[1:] == 1, tokens[1:], -100).tolist()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask])))  # on, off, on, off, ...
    limited = assemble(store, whole._replace(first_target=edges[[2]], end_target=edges[[3]]))
    kept = np.flatnonzero(limited["targets"] != -100) + 1  # as indices of stored tokens
    assert kept.tolist() == list(range(edges[2], edges[3]))


def test_row_length_is_checked():
    with pytest.raises(UserError, match="--max_seq_len 0"):
        check_max_seq_len(0)
