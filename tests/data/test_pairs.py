"""Rows of pairs and of judged replies, against the encoding of each conversation for itself."""

import json

import numpy as np
import pytest

from minillm.data import JudgedRows, PairRows, StepBatches
from minillm.data.cache import tokenise
from minillm.data.pairs import count_pairs, count_replies
from minillm.errors import UserError
from minillm.tokenizer import encode_chat, load_tokenizer
from tests.foreign.layouts import make_tokenizer

from .conftest import sentence

USER = {"role": "user", "content": "why"}


def conversation(prompt, reply):
    return [*prompt, {"role": "assistant", "content": reply}]


@pytest.fixture
def pairs():
    """25 pairs of ragged length, some with a system turn or a history."""
    found = []
    for n in range(25):
        prompt = [{"role": "system", "content": "be brief"}] if n % 4 == 0 else []
        if n % 3 == 0:
            prompt += conversation([{"role": "user", "content": sentence(n, 1 + n % 5)}], sentence(n + 1, 2))
        prompt += [{"role": "user", "content": sentence(n + 2, 1 + n % 7)}]
        replies = sentence(n, 1 + n * 3 % 11), sentence(n + 5, 1 + n * 5 % 9)
        found.append((prompt, *replies))
    return found


@pytest.fixture
def rows(tokenizer, write, pairs, tmp_path):
    """Call it with the kind and settings: rows of the pairs."""

    def rows(kind=PairRows, **settings):
        lines = [{"chosen": conversation(p, a), "rejected": conversation(p, b)} for p, a, b in pairs]
        path = write("pairs.jsonl", lines)
        return kind(path, tokenizer, **({"max_seq_len": 160, "cache_dir": tmp_path / "cache"} | settings))

    return rows


def documents_of(row, prefix=""):
    """(ids, targets) of each document of a row."""
    columns = [row[prefix + name] for name in ("document_ids", "input_ids", "targets", "position_ids")]
    found = []
    for document in range(int(columns[0].max()) + 1):
        here = columns[0] == document
        ids, targets, positions = (column[here].tolist() for column in columns[1:])
        assert positions == list(range(len(ids)))
        found.append((tuple(ids), tuple(targets)))
    return found


def encoded(tokenizer, prompt, reply):
    ids, mask = encode_chat(tokenizer, conversation(prompt, reply), train_on="last")
    end = max(t for t in range(len(mask)) if mask[t])
    targets = [i if learnt else -100 for i, learnt in zip(ids[1:], mask[1:], strict=True)]
    return tuple(ids[:end]), tuple(targets[:end])


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_pair_is_there_once_chosen_before_rejected(rows, tokenizer, pairs, packing):
    found_rows = rows(packing=packing)
    found = []
    for row in (found_rows[index] for index in range(len(found_rows))):
        documents = documents_of(row)
        assert len(documents) % 2 == 0
        assert len(row["input_ids"]) <= 320
        found += list(zip(documents[0::2], documents[1::2], strict=True))
    expected = [(encoded(tokenizer, p, a), encoded(tokenizer, p, b)) for p, a, b in pairs]
    assert sorted(found) == sorted(expected)
    assert found_rows.n_targets == len(pairs)
    assert (len(found_rows) < len(pairs)) == (packing == "best_fit")
    if packing == "none":
        assert found == expected


@pytest.mark.parametrize(("kind", "count"), [(PairRows, count_pairs), (JudgedRows, count_replies)])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_counts_of_batches_add_up_with_rows_of_padding(rows, kind, count, batch_size):
    found = rows(kind)
    loader = StepBatches(found, batch_size=batch_size, global_batch_size=3 * batch_size)
    total = sum(float(count(batch)) for _, step in loader.iterate(0) for batch in step)
    assert total == found.n_targets == (25 if kind is PairRows else 50)


def test_judged_rows_stand_beside_rows_with_other_replies(rows, tokenizer, pairs):
    found_rows = rows(JudgedRows)
    found = []
    for index in range(len(found_rows)):
        row = found_rows[index]
        documents, others = documents_of(row), documents_of(row, "other_")
        assert max(len(row["input_ids"]), len(row["other_input_ids"])) <= 160
        labels = [int(row["labels"][row["document_ids"] == n][0]) for n in range(len(documents))]
        found += list(zip(documents, labels, others, strict=True))
    expected = []
    for number, (prompt, good, bad) in enumerate(pairs):
        neighbour = pairs[number - 1] if number else pairs[1]
        for reply, label, other in ((good, 1, neighbour[1]), (bad, 0, neighbour[2])):
            expected.append((encoded(tokenizer, prompt, reply), label, encoded(tokenizer, prompt, other)))
    assert sorted(found) == sorted(expected)


def test_the_plan_and_the_hash_follow_from_data_and_settings(rows):
    first, again, other = rows(), rows(), rows(seed=1)
    assert first.data_hash == again.data_hash != other.data_hash
    assert all((first[i]["input_ids"] == again[i]["input_ids"]).all() for i in range(len(first)))
    assert rows(max_seq_len=159).data_hash != first.data_hash != rows(JudgedRows).data_hash


def test_what_is_too_long_is_set_aside_whole(rows, tokenizer, pairs, tmp_path):
    lengths = [max(len(encoded(tokenizer, p, reply)[0]) for reply in (a, b)) for p, a, b in pairs]
    limit = sorted(lengths)[15]
    found = rows(max_seq_len=limit)
    too_long = [line for line, length in enumerate(lengths, 1) if length > limit]
    assert found.n_targets == 25 - len(too_long) == found.summary["documents"] / 2
    assert found.summary["rejected"] == len(too_long)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl.rejected.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == too_long
    assert all(f"--max_seq_len {limit}" in line["reason"] for line in lines)
    with pytest.raises(UserError, match=f"line {too_long[0]}"):
        rows(max_seq_len=limit, strict=True)
    with pytest.raises(UserError, match=r"no record of .* can be used; the first, line \d+: .*raise it"):
        rows(max_seq_len=3)


BAD = {
    "prompts differ": ({"chosen": [USER, {"role": "assistant", "content": "a"}],
                        "rejected": [{"role": "user", "content": "who"}, {"role": "assistant", "content": "b"}]},
                       "share every message but the last"),
    "equal": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal"),
    "empty": ({"prompt": "q", "chosen": "a", "rejected": "  "}, "rejected is an empty answer"),
    "another kind": ({"text": "abc"}, "a text record, where preference records are expected"),
    "a lone surrogate in one": ('{"prompt": "q", "chosen": "a", "rejected": "\\ud800"}', "lone surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_pair_is_set_aside_and_the_others_stay_pairs(write, tokenizer, tmp_path, bad):
    record, reason = BAD[bad]
    good = [{"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(4)]
    path = write("some.jsonl", [*good[:2], record, *good[2:]])
    found = PairRows(path, tokenizer, max_seq_len=60, cache_dir=tmp_path / "cache", packing="none")
    assert len(found) == 4
    for number in range(4):
        chosen, rejected = documents_of(found[number])
        assert f"yes {number}" in tokenizer.decode([i for i in chosen[1] if i >= 0])
        assert "no" in tokenizer.decode([i for i in rejected[1] if i >= 0])
    (line,) = [json.loads(line) for line in (tmp_path / "some.jsonl.rejected.jsonl").read_text().splitlines()]
    assert line["line"] == 3
    assert reason in line["reason"]
    with pytest.raises(UserError, match="line 3"):
        PairRows(path, tokenizer, max_seq_len=60, cache_dir=tmp_path / "other", strict=True)


def test_prompts_that_become_other_tokens_are_set_aside(write, tokenizer, tmp_path, monkeypatch):
    """As a template that draws something for each conversation would make them."""
    encode, calls = tokenise.encode_chats, []

    def drawn(tokenizer, conversations, **options):
        found = encode(tokenizer, conversations, **options)
        calls.append(1)
        ids, mask = found[3]
        found[3] = ([ids[0], (ids[1] + 1) % 300, *ids[2:]], mask)
        return found

    monkeypatch.setattr(tokenise, "encode_chats", drawn)
    path = write("some.jsonl", [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(3)])
    found = PairRows(path, tokenizer, max_seq_len=60, cache_dir=tmp_path / "cache")
    assert found.n_targets == 2
    assert calls
    (line,) = [json.loads(line) for line in (tmp_path / "some.jsonl.rejected.jsonl").read_text().splitlines()]
    assert line["line"] == 2
    assert line["reason"].startswith("the prompts before the last turns of the two replies are not the same tokens")


@pytest.mark.parametrize(("settings", "word"), [({"packing": "stream"}, "stream"), ({"max_seq_len": 0}, "max_seq_len")])
def test_settings_out_of_range_are_refused(rows, settings, word):
    with pytest.raises(UserError, match=word):
        rows(**settings)


def test_judged_records_of_their_own(write, tokenizer, tmp_path):
    lines = [{"prompt": f"q{n}", "completion": f"reply {n}", "label": n % 2 == 0} for n in range(5)]
    path = write("judged.jsonl", lines)
    found = JudgedRows(path, tokenizer, max_seq_len=60, cache_dir=tmp_path / "cache", packing="none")
    assert [int(found[n]["labels"].max()) for n in range(5)] == [1, 0, 1, 0, 1]
    assert all(np.unique(found[n]["labels"]).size == 1 for n in range(5))
    single = write("single.jsonl", lines[:1])
    with pytest.raises(UserError, match="at least two"):
        JudgedRows(single, tokenizer, max_seq_len=60, cache_dir=tmp_path / "cache")


def only_rejected(tmp_path, name):
    return [json.loads(line) for line in (tmp_path / f"{name}.rejected.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ["minimind3", "qwen3", "llama2", "metaspace_chatml"])
def test_replies_that_begin_at_different_tokens_are_a_pair(layout, write, tmp_path):
    """A think block in one reply alone, and blanks that join the header: each reply counts from its own first token."""
    tokenizer = load_tokenizer(make_tokenizer(layout, tmp_path / layout))
    thought = "<think>\nr\n</think>\n\nans"
    replies = [(thought, "b"), ("b", thought), ("   ans", "b"), ("b", "\n\nc")]
    path = write("some.jsonl", [{"prompt": "q", "chosen": one, "rejected": two} for one, two in replies])
    found = PairRows(path, tokenizer, max_seq_len=80, cache_dir=tmp_path / "cache", packing="none")
    assert len(found) == 4
    for row, pair in zip(map(found.__getitem__, range(4)), replies, strict=True):
        assert documents_of(row) == [encoded(tokenizer, [{"role": "user", "content": "q"}], reply) for reply in pair]
    lines = [{"prompt": "q", "completion": reply, "label": True} for pair in replies for reply in pair]
    judged = write("judged.jsonl", [*lines, {"prompt": "r", "completion": "b", "label": False}])
    assert JudgedRows(judged, tokenizer, max_seq_len=80, cache_dir=tmp_path / "cache").n_targets > 0


def test_replies_of_several_turns_are_named_for_what_they_are(write, tokenizer, tmp_path):
    roles = ("assistant", "user", "assistant")
    one, two = ([{"role": role, "content": f"{role} {n}"} for role in roles] for n in (1, 2))
    short = [{"role": "assistant", "content": "no"}]
    lines = [{"prompt": [USER], "chosen": a, "rejected": b} for a, b in ((one, two), (one, short), (short, two))]
    path = write("some.jsonl", lines)
    with pytest.raises(UserError, match=r"no record of .* can be used; the first, line 1: the prompts before the last"):
        PairRows(path, tokenizer, max_seq_len=160, cache_dir=tmp_path / "cache")
    assert [line["line"] for line in only_rejected(tmp_path, "some.jsonl")] == [1, 2, 3]


def test_pairs_of_every_layout_give_the_same_rows(write, tokenizer, tmp_path):
    """The prompt stands once in each conversation, wherever the record has it."""
    system, user, chosen, rejected = (
        {"role": role, "content": content}
        for role, content in (("system", "be brief"), ("user", "why"), ("assistant", "the fox"), ("assistant", "a dog"))
    )
    layouts = [
        {"prompt": [system, user], "chosen": "the fox", "rejected": "a dog"},
        {"chosen": [system, user, chosen], "rejected": [system, user, rejected]},
        {"prompt": "why", "chosen": [system, user, chosen], "rejected": [system, user, rejected]},
        {"prompt": " why ", "chosen": [system, user, chosen], "rejected": [system, user, rejected]},
        {"prompt": [system, user], "chosen": [user, chosen], "rejected": [user, rejected]},
        {"system": "be brief", "prompt": "why", "chosen": "the fox", "rejected": "a dog"},
        {
            "system": "be brief",
            "conversations": [{"from": "human", "value": "why"}],
            "chosen": {"from": "gpt", "value": "the fox"},
            "rejected": {"from": "gpt", "value": "a dog"},
        },
        {"system": "be brief", "instruction": "why", "input": "", "chosen": "the fox", "rejected": "a dog"},
    ]
    expected = [encoded(tokenizer, [system, user], reply["content"]) for reply in (chosen, rejected)]
    for layout in layouts:
        path = write("a.jsonl", [layout])
        rows = PairRows(path, tokenizer, max_seq_len=100, cache_dir=tmp_path / "c", strict=True)
        assert documents_of(rows[0]) == expected
