"""Rows and steps of any lengths: nothing lost, nothing doubled, and columns that mean what they say."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import ReplayRows, StepBatches
from minillm.data.batches import DERIVED
from minillm.data.chat import ChatRows
from minillm.data.packing import best_fit, cut_long
from minillm.data.pairs import JudgedRows, PairRows
from minillm.data.reason_rows import ReasonRows
from minillm.data.text import TextRows
from minillm.errors import UserError
from minillm.tokenizer import encode_chat

from .strategies import RECORDS, TIMEOUT_S, as_json, examples, outcome, scratch

pytestmark = pytest.mark.timeout(TIMEOUT_S)
USUAL = ("input_ids", "targets", "position_ids", "document_ids")


@examples(200)
@given(st.data())
def test_best_fit_puts_every_item_into_one_row(data):
    capacity = data.draw(st.integers(1, 50))
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=40)), np.int64)
    seed = data.draw(st.integers(0, 2**32))
    order, starts = best_fit(lengths, capacity, seed=seed)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    sums = [int(lengths[order[begin:end]].sum()) for begin, end in pairwise(starts)]
    assert all(0 < total <= capacity for total in sums)
    if len(sums) > 1:  # no two rows could be one: a later one was begun because its items fitted nowhere
        assert min(sums[i] + sums[j] for i in range(len(sums)) for j in range(i)) > capacity
    again, _ = best_fit(lengths, capacity, seed=seed)
    assert again.tolist() == order.tolist()


@examples(150)
@given(st.lists(st.integers(1, 60), max_size=20), st.integers(1, 20))
def test_cut_documents_are_whole_again(n_pairs, max_seq_len):
    pieces = cut_long(np.array(n_pairs, np.int64), max_seq_len)
    found = {d: [] for d in range(len(n_pairs))}
    for document, start, length in zip(*pieces[:3], strict=True):
        assert 1 <= length <= max_seq_len
        found[document] += range(start, start + length)
    assert found == {d: list(range(n)) for d, n in enumerate(n_pairs)}


# ---- rows --------------------------------------------------------------------------------------------------------


def check_columns(rows, row: int, prefix: str = "") -> dict:
    """Return the columns of a row, once their lengths, positions and documents agree."""
    columns = {name: rows[row][prefix + name] for name in USUAL}
    assert len({len(column) for column in columns.values()}) == 1
    documents, positions = columns["document_ids"], columns["position_ids"]
    assert 1 <= len(documents) <= rows.max_seq_len
    begins = np.flatnonzero(np.diff(documents, prepend=-1))
    assert documents[begins].tolist() == list(range(len(begins)))
    assert np.diff(documents, prepend=0).min() >= 0
    expected = np.concatenate(
        [np.arange(end - begin) for begin, end in zip(begins, [*begins[1:], len(documents)], strict=True)]
    )
    assert positions.tolist() == expected.tolist()
    within = documents[1:] == documents[:-1]
    inputs, targets = columns["input_ids"], columns["targets"]
    kept = targets[:-1][within] != -100
    assert (targets[:-1][within] == inputs[1:][within])[kept].all()
    return columns


def stored_documents(store) -> list[list[int]]:
    ids = store.gather("tokens", np.arange(store.n_tokens)).tolist()
    return [ids[begin:end] for begin, end in pairwise(store.offsets)]


def split_by_document(columns: dict) -> list[dict]:
    """Return each piece of a row as its own columns."""
    n = int(columns["document_ids"].max()) + 1
    return [{name: column[columns["document_ids"] == d].tolist() for name, column in columns.items()} for d in range(n)]


@examples(60)
@given(st.data())
def test_rows_of_text_lose_and_double_nothing(tokenizer, data):
    several = data.draw(st.lists(st.lists(RECORDS["text"], min_size=1, max_size=4), min_size=1, max_size=2))
    packing = data.draw(st.sampled_from(["stream", "best_fit", "none"]))
    with scratch() as folder:
        paths = write(folder, several)
        rows = TextRows(paths, tokenizer, max_seq_len=data.draw(st.integers(1, 40)), packing=packing, cache_dir=folder)
        columns = [check_columns(rows, row) for row in range(len(rows))]
        documents = stored_documents(rows.store)
        counts = rows.target_counts
    pairs = [pair for row in columns for pair in zip(row["input_ids"], row["targets"], strict=True)]
    assert Counter(pairs) == Counter(pair for ids in documents for pair in pairwise(ids))
    assert len(documents) == sum(map(len, several))
    assert rows.n_targets == len(pairs) == rows.lengths.sum() == counts.sum()
    if packing == "stream":
        assert pairs == [pair for ids in documents for pair in pairwise(ids)]
        assert all(len(row["targets"]) == rows.max_seq_len for row in columns[:-1])


@pytest.mark.parametrize("make", [ChatRows, ReasonRows])
@examples(40)
@given(st.data())
def test_rows_of_chats_have_every_reachable_target_once(make, tokenizer, data):
    kind = "chat" if make is ChatRows else "reason"
    records = data.draw(st.lists(RECORDS[kind].filter(lambda r: "messages" in r), min_size=1, max_size=4))
    train_on = data.draw(st.sampled_from(["all", "last", "per_turn"]))
    packing = data.draw(st.sampled_from(["best_fit", "none"]))
    max_seq_len = data.draw(st.sampled_from([5, 12, 30, 2000]))
    more = {} if make is ChatRows else {"tag_weight": 3.0}
    expected = []
    for record in records:
        ids, mask = encode_chat(tokenizer, record["messages"], train_on="last" if train_on == "last" else "all")
        expected += [ids[t] for t in range(1, min(len(ids), max_seq_len + 1)) if mask[t]]
    with scratch() as folder:
        settings = {"max_seq_len": max_seq_len, "train_on": train_on, "packing": packing, "cache_dir": folder}
        rows = outcome(make, write(folder, [records]), tokenizer, **settings, **more)
        if isinstance(rows, UserError):
            assert not expected
            return
        columns = [check_columns(rows, row) for row in range(len(rows))]
        weights = [rows[row].get("weights") for row in range(len(rows))]
    targets = [target for row in columns for target in row["targets"].tolist() if target != -100]
    assert Counter(targets) == Counter(expected)
    assert rows.n_targets == len(targets) == rows.target_counts.sum()
    assert rows.summary["rows"] == len(rows)
    if make is ReasonRows:
        tags = [tokenizer.token_id(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
        for row, weight in zip(columns, weights, strict=True):
            assert weight.tolist() == [3.0 if target in tags else 1.0 for target in row["targets"]]


@examples(50)
@given(st.data())
def test_pairs_stand_side_by_side(tokenizer, data):
    records = data.draw(st.lists(RECORDS["preference"], min_size=1, max_size=5))
    packing = data.draw(st.sampled_from(["best_fit", "none"]))
    with scratch() as folder:
        path = write(folder, [records])
        rows = PairRows(path, tokenizer, max_seq_len=500, packing=packing, cache_dir=folder)
        columns = [check_columns(rows, row) for row in range(len(rows))]
    replies = [
        tokenizer.decode([t for t in piece["targets"] if t != -100])
        for row in columns
        for piece in split_by_document(row)
    ]
    wanted = [tuple(reply_of(record[side]) + "<|im_end|>" for side in ("chosen", "rejected")) for record in records]
    assert Counter(zip(replies[::2], replies[1::2], strict=True)) == Counter(wanted)
    assert rows.n_targets == len(records)


@examples(50)
@given(st.data())
def test_judged_replies_stand_beside_others(tokenizer, data):
    records = data.draw(st.lists(RECORDS["judged"], min_size=2, max_size=5, unique_by=lambda record: record["prompt"]))
    packing = data.draw(st.sampled_from(["best_fit", "none"]))
    with scratch() as folder:
        rows = JudgedRows(write(folder, [records]), tokenizer, max_seq_len=500, packing=packing, cache_dir=folder)
        found = Counter()
        for row in range(len(rows)):
            labels = [piece[0] for piece in split_labels(rows[row])]
            here, others = (split_by_document(check_columns(rows, row, prefix)) for prefix in ("", "other_"))
            assert len(here) == len(others) == len(labels)
            for own, other, label in zip(here, others, labels, strict=True):
                first = next(i for i, target in enumerate(own["targets"]) if target != -100)
                assert own["input_ids"][: first + 1] == other["input_ids"][: first + 1]  # one question
                found[tokenizer.decode(own["targets"][first:]), label] += 1
    assert found == Counter((record["completion"] + "<|im_end|>", int(record["label"])) for record in records)


def reply_of(value) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def split_labels(columns: dict) -> list[list[int]]:
    return [columns["labels"][columns["document_ids"] == d].tolist() for d in range(columns["document_ids"].max() + 1)]


def write(folder, files: list[list[dict]]) -> list:
    paths = [folder / f"{n}.jsonl" for n in range(len(files))]
    for path, records in zip(paths, files, strict=True):
        path.write_bytes(b"".join(as_json(record) + b"\n" for record in records))
    return paths


# ---- steps -------------------------------------------------------------------------------------------------------


class Numbered:
    """Row i holds the number i + 1, ``lengths[i]`` times, in two documents."""

    summary, target_bytes, log_prob, store, target_counts = {}, 0, None, None, None

    def __init__(self, lengths: list[int], fixed_len: int | None):
        self.lengths, self.fixed_len, self.max_seq_len = np.array(lengths), fixed_len, max(lengths)
        self.data_hash = str(lengths)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, row):
        length = int(self.lengths[row])
        half = length // 2
        documents = np.repeat([0, 1] if half else [0], [half, length - half] if half else [length])
        positions = np.concatenate([np.arange(half), np.arange(length - half)])
        ids = np.full(length, row + 1)
        return {"input_ids": ids, "targets": ids, "position_ids": positions, "document_ids": documents}


def rows_of_step(batches: list[StepBatches], epoch: int, index: int) -> list[int]:
    """Return the numbers of the rows that all ranks together see in a step, padding checked on the way."""
    seen = []
    for loader in batches:
        step = loader.step(epoch, index)
        assert len(step) == loader.n_micro_batches
        for batch in step:
            shapes = {tensor.shape for name, tensor in batch.items() if name not in DERIVED}
            assert shapes == {(loader.batch_size, batch["input_ids"].shape[1])}
            is_padding = batch["document_ids"] == -1
            for name, padding in (("input_ids", 0), ("targets", -100), ("position_ids", 0)):
                assert (batch[name][is_padding] == padding).all()
            assert (batch["input_ids"][~is_padding] > 0).all()
            for row, pads in zip(batch["input_ids"], is_padding, strict=True):
                number = int(row[0]) if not pads[0] else 0
                if number:
                    assert (~pads).sum() == loader.rows[number - 1]["input_ids"].size
                    seen.append(number - 1)
    return seen


@examples(120)
@given(st.data())
def test_steps_have_every_row_once_however_they_are_cut(data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=25))
    rows = Numbered(lengths, data.draw(st.sampled_from([None, 6])))
    if data.draw(st.booleans()):
        old = Numbered(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)), rows.fixed_len)
        rows = ReplayRows(rows, old, share=data.draw(st.floats(0.05, 0.8)))
    whole = data.draw(st.sampled_from([1, 2, 4, 6, 12]))
    seed, epoch = data.draw(st.integers(0, 2**63)), data.draw(st.integers(0, 1000))
    one = StepBatches(rows, batch_size=whole, global_batch_size=whole, seed=seed)
    order = [one.step_rows(epoch, index).tolist() for index in range(one.steps_per_epoch)]
    new = [number for step in order for number in step if number < len(lengths)]
    assert sorted(new) == list(range(len(lengths)))
    assert sum(map(len, order)) == len(rows)
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    world_size = data.draw(st.sampled_from(divisors))
    batch_size = data.draw(st.sampled_from([n for n in divisors if whole // world_size % n == 0]))
    ranks = [
        StepBatches(rows, batch_size=batch_size, global_batch_size=whole, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    for loader in ranks:  # another epoch before it changes nothing
        loader.step_rows(data.draw(st.integers(0, 1000)), 0)
    for index, numbers in enumerate(order):
        ids = [int(rows[number]["input_ids"][0]) - 1 for number in numbers]
        if isinstance(rows, ReplayRows):  # two kinds of rows have the same numbers
            seen = Counter(int(b["input_ids"][i, 0]) - 1 for r in ranks for b in r.step(epoch, index)
                           for i in range(batch_size) if b["document_ids"][i, 0] >= 0)  # fmt: skip
            assert seen == Counter(ids)
        else:
            assert sorted(rows_of_step(ranks, epoch, index)) == sorted(ids)


@examples(40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 5))
def test_iterating_gives_the_steps_from_any_start(lengths, whole, epoch):
    loader = StepBatches(Numbered(lengths, None), batch_size=1, global_batch_size=whole, seed=3)
    for start in range(loader.steps_per_epoch + 1):
        found = [
            (index, [batch["input_ids"].tolist() for batch in step]) for index, step in loader.iterate(epoch, start)
        ]
        expected = [
            (index, [batch["input_ids"].tolist() for batch in loader.step(epoch, index)])
            for index in range(start, loader.steps_per_epoch)
        ]
        assert found == expected
