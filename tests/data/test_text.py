import json
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.data.text import TextRows
from minillm.errors import UserError

PACKINGS = ("stream", "best_fit", "none")


class ByteTokenizer:
    """One token per byte, so that a test knows every id; a document begins with 257 and ends with 256."""

    vocab_size, document_hash = 258, "bytes"

    def document(self, ids):
        return [257, *ids, 256]

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]

    def token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b"<s>" if token_id == 257 else b"</s>"


def pairs_of(texts):
    """Every (document, index) pair as (input, target), the slow way."""
    pairs = []
    for text in texts:
        stored = [257, *text.encode(), 256]
        pairs += pairwise(stored)
    return pairs


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), max_seq_len=st.integers(1, 33))
def test_every_target_occurs_exactly_once(packing, lengths, max_seq_len, tmp_path_factory):
    directory = tmp_path_factory.mktemp("t")
    texts = ["".join(chr(97 + (d * 7 + i) % 26) for i in range(n)) for d, n in enumerate(lengths)]
    files = []
    for name, part in (("a", texts[: len(texts) // 2]), ("b", texts[len(texts) // 2 :])):
        if part:
            files.append(directory / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    rows = TextRows(files, ByteTokenizer(), max_seq_len=max_seq_len, packing=packing, cache_dir=directory)
    seen = Counter()
    for i in range(len(rows)):
        row = rows[i]
        assert {len(column) for column in row.values()} == {rows.lengths[i]}
        assert 1 <= rows.lengths[i] <= max_seq_len
        seen.update(zip(row["input_ids"].tolist(), row["targets"].tolist(), strict=True))
        assert_positions(row)
    assert seen == Counter(pairs_of(texts))
    assert rows.n_targets == sum(lengths) + len(lengths) == rows.target_counts.sum()
    assert rows.target_bytes == sum(lengths)
    if packing == "stream":
        assert rows.lengths[:-1].tolist() == [max_seq_len] * (len(rows) - 1)


def assert_positions(row):
    """Positions count from 0 within each piece, and the pieces are numbered in order."""
    new = np.append(True, row["document_ids"][1:] != row["document_ids"][:-1])
    starts = np.flatnonzero(new)
    assert row["document_ids"].tolist() == (np.cumsum(new) - 1).tolist()
    assert (
        row["position_ids"].tolist() == (np.arange(len(new)) - np.repeat(starts, np.diff([*starts, len(new)]))).tolist()
    )


def test_stream_is_the_text_in_order(write, texts, tokenizer, tmp_path):
    rows = TextRows(write("a.jsonl", [{"text": t} for t in texts]), tokenizer, max_seq_len=48, cache_dir=tmp_path)
    eos = tokenizer.eos_token_id
    inputs = np.concatenate([rows[i]["input_ids"] for i in range(len(rows))]).tolist()
    targets = np.concatenate([rows[i]["targets"] for i in range(len(rows))]).tolist()
    assert inputs == [t for text in texts for t in [eos, *tokenizer.encode(text)]]
    assert targets == [t for text in texts for t in [*tokenizer.encode(text), eos]]
    assert tokenizer.decode(targets[: len(tokenizer.encode(texts[0]))]) == texts[0]


def test_best_fit_keeps_documents_whole(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts])
    rows = TextRows(path, tokenizer, max_seq_len=300, packing="best_fit", cache_dir=tmp_path)
    eos = tokenizer.eos_token_id
    found = []
    for i in range(len(rows)):
        row = rows[i]
        for document in range(row["document_ids"].max() + 1):
            here = row["document_ids"] == document
            assert row["input_ids"][here][0] == eos == row["targets"][here][-1]
            found.append(tokenizer.decode(row["targets"][here][:-1]))
    assert sorted(found) == sorted(texts)
    assert rows.summary["fill"] > 0.9
    assert rows.fixed_len == 300
    assert rows.summary["cut"] == 0


def test_summary_log_prob_and_hash(write, texts, tokenizer, tmp_path):
    known = write("a.jsonl", [{"text": t, "log_prob": -2.5} for t in texts])
    partly = write("b.jsonl", [{"text": "fox", "log_prob": -1}, {"text": "dog"}, "{"])
    rows = TextRows(known, tokenizer, max_seq_len=20, cache_dir=tmp_path)
    assert rows.log_prob == -2.5 * len(texts)
    both = TextRows(f"{known},{partly}", tokenizer, max_seq_len=20, packing="none", cache_dir=tmp_path)
    assert both.log_prob is None
    assert both.fixed_len is None
    assert both.summary["documents"] == len(texts) + 2
    assert both.summary["rejected"] == 1
    assert both.summary["rejected_files"] == [f"{partly}.rejected.jsonl"]
    assert both.summary["cut"] == sum(len(tokenizer.encode(t)) + 1 > 20 for t in texts)
    assert [f["documents"] for f in both.summary["files"]] == [len(texts), 2]
    hashes = {both.data_hash, rows.data_hash, TextRows(known, tokenizer, max_seq_len=21, cache_dir=tmp_path).data_hash}
    assert len(hashes) == 3
    assert TextRows(known, tokenizer, max_seq_len=20, cache_dir=tmp_path).data_hash == rows.data_hash


def test_rows_survive_pickling(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts])
    for packing in PACKINGS:
        rows = TextRows(path, tokenizer, max_seq_len=30, packing=packing, cache_dir=tmp_path)
        copy = pickle.loads(pickle.dumps(rows))
        assert all(np.array_equal(rows[3][name], copy[3][name]) for name in rows[3])


def test_errors(write, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": "fox"}, "{"])
    for settings_, reason in [
        ({"max_seq_len": 0}, "--max_seq_len 0"),
        ({"max_seq_len": 8, "packing": "tight"}, "stream, best_fit, none"),
        ({"max_seq_len": 8, "strict": True}, "line 2: broken JSON"),
    ]:
        with pytest.raises(UserError, match=reason):
            TextRows(path, tokenizer, cache_dir=tmp_path / "c", **settings_)
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").iterdir())
    rows = TextRows(path, tokenizer, max_seq_len=8, cache_dir=tmp_path / "c")
    with pytest.raises(IndexError):
        rows[len(rows)]
