"""The split into training and validation: by content, complete, and on no side twice."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from minillm.data import ChatRows, DataFiles, JudgedRows, PairRows, TextRows, read_records
from minillm.errors import UserError

from .conftest import sentence

TEXTS = [{"text": sentence(n, 3 + n % 7) + str(n)} for n in range(60)]


def sides(path, ratio):
    return DataFiles(path, ratio, "train"), DataFiles(path, ratio, "valid")


def documents(rows, tokenizer) -> list[str]:
    """Every document of rows, as text."""
    store = rows.store
    bounds = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [tokenizer.decode(store.gather("tokens", np.arange(*b)), skip_special_tokens=True) for b in bounds]


def held_out(path, ratio) -> set[str]:
    valid = DataFiles(path, ratio, "valid")
    return {record.text for record in read_records(path) if valid.takes(record)}


def test_every_record_is_on_one_side_and_equal_ones_on_the_same(write, tokenizer, tmp_path):
    path = write("a.jsonl", TEXTS + TEXTS[::-1])  # every text twice
    parts = [
        documents(TextRows(side, tokenizer, max_seq_len=99, cache_dir=tmp_path / "c"), tokenizer)
        for side in sides(path, 0.25)
    ]
    assert sorted(parts[0] + parts[1]) == sorted(record["text"] for record in TEXTS + TEXTS)
    assert not set(parts[0]) & set(parts[1])
    assert 0.1 < len(parts[1]) / 120 < 0.4
    assert set(parts[1]) == held_out(path, 0.25)


def test_shuffling_and_growing_move_nothing_and_a_larger_share_takes_more(write):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    more = [{"text": f"new {n}"} for n in range(30)]
    plain = held_out(write("a.jsonl", TEXTS), 0.2)
    assert held_out(write("b.jsonl", shuffled), 0.2) == plain
    assert held_out(write("c.jsonl", shuffled + more), 0.2) >= plain
    assert held_out(write("d.jsonl", TEXTS), 0.4) > plain
    decorated = [record | {"id": n, "log_prob": -1.0} for n, record in enumerate(TEXTS)]
    assert held_out(write("e.jsonl", decorated), 0.2) == plain


def test_the_share_is_that_of_the_ratio():
    """A hash that is not uniform would hold out too much or too little: 4 standard deviations around 5 %."""
    from minillm.data import Record

    valid = DataFiles("-", 0.05, "valid")
    n = sum(valid.takes(Record(kind="text", line=1, text=str(number))) for number in range(20_000))
    assert abs(n - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("kind", [PairRows, JudgedRows])
def test_all_answers_to_one_question_are_on_one_side(kind, write, tokenizer, tmp_path):
    if kind is PairRows:
        records = [
            {"prompt": f"ask {n}", "chosen": f"yes {k}", "rejected": f"no {k}"} for n in range(20) for k in (1, 2)
        ]
    else:
        records = [{"prompt": f"ask {n}", "completion": f"say {k}", "label": k == 1} for k in (1, 2) for n in range(20)]
    prompts = []
    for side in sides(write("a.jsonl", records), 0.3):
        rows = kind(side, tokenizer, max_seq_len=200, cache_dir=tmp_path / "c")
        prompts.append({text.split("ask ")[1].split("\n")[0] for text in documents(rows, tokenizer)})
    assert all(prompts)
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 20


def test_the_split_is_part_of_every_key(write, tokenizer, tmp_path):
    path = write("a.jsonl", TEXTS)
    settings = [DataFiles(path), *sides(path, 0.2), *sides(path, 0.3)]
    rows = [TextRows(side, tokenizer, max_seq_len=20, cache_dir=tmp_path / "c") for side in settings]
    assert len({each.data_hash for each in rows}) == len({each.store.shards[0].path for each in rows}) == 5
    assert rows[0].data_hash == TextRows(path, tokenizer, max_seq_len=20, cache_dir=tmp_path / "c").data_hash
    assert rows[0].n_targets == rows[1].n_targets + rows[2].n_targets


@pytest.mark.parametrize("packing", ["stream", "best_fit", "none"])
def test_a_file_may_have_nothing_on_one_side(packing, write, tokenizer, tmp_path):
    path = write("a.jsonl", TEXTS)
    kept = [record for record in TEXTS if record["text"] not in held_out(path, 0.2)][:2]
    files = [write("none.jsonl", kept), path, write("none2.jsonl", kept[:1])]
    rows = TextRows(DataFiles(files, 0.2, "valid"), tokenizer, max_seq_len=9, packing=packing, cache_dir=tmp_path / "c")
    alone = TextRows(DataFiles(path, 0.2, "valid"), tokenizer, max_seq_len=9, packing=packing, cache_dir=tmp_path / "c")
    assert len(rows) == len(alone)
    for row in range(len(rows)):
        assert rows[row]["targets"].tolist() == alone[row]["targets"].tolist()
    assert [file["documents"] for file in rows.summary["files"]] == [0, len(held_out(path, 0.2)), 0]


def test_a_chat_file_may_have_nothing_on_one_side(write, tokenizer, tmp_path):
    talks = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(40)
    ]
    path = write("a.jsonl", talks)
    valid = DataFiles(path, 0.3, "valid")
    kept = [talk for talk, record in zip(talks, read_records(path), strict=True) if not valid.takes(record)]
    files = DataFiles([write("none.jsonl", kept), path], 0.3, "valid")
    both, alone = (ChatRows(each, tokenizer, max_seq_len=50, cache_dir=tmp_path / "c") for each in (files, valid))
    assert both.n_targets == alone.n_targets > 0


def test_an_empty_side_is_one_clear_error(write, tokenizer, tmp_path):
    path = write("a.jsonl", TEXTS[:3])
    with pytest.raises(UserError, match=r"--valid_ratio 1e-09 holds out none of the 3 usable records of .*raise it"):
        TextRows(DataFiles(path, 1e-9, "valid"), tokenizer, max_seq_len=9, cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match=r"holds out all 3 usable records of .*lower it"):
        TextRows(DataFiles(path, 0.999999999, "train"), tokenizer, max_seq_len=9, cache_dir=tmp_path / "c")
    with pytest.raises(UserError, match="--valid_ratio 1: must be at least 0 and below 1"):
        DataFiles(path, 1)
    with pytest.raises(UserError, match="valid side of --valid_ratio has no usable record"):
        ChatRows(DataFiles(write("b.jsonl", TEXTS), 0.3, "valid"), tokenizer, max_seq_len=9, cache_dir=tmp_path / "c")


def test_bad_lines_of_both_sides_are_kept(write, tokenizer, tmp_path):
    """A line that is not a record is reported by the training side; the other one has a file of its own."""
    lone = {"text": "\ud800"}
    path = write("a.jsonl", [*TEXTS, "{", json.dumps(lone)])
    (bad,) = [record for record in read_records(path, on_reject=lambda *bad: None) if record.text == lone["text"]]
    for side in sides(path, 0.3):
        TextRows(side, tokenizer, max_seq_len=99, cache_dir=tmp_path / "c")
    path_of = {False: f"{path}.rejected.jsonl", True: f"{path}.valid.rejected.jsonl"}
    lines = {61: path_of[False], 62: path_of[DataFiles(path, 0.3, "valid").takes(bad)]}
    for line, place in lines.items():
        assert line in [json.loads(entry)["line"] for entry in Path(place).read_text("utf-8").splitlines()]
