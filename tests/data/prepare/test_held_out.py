"""Held-out records that share a passage with a training record, against a search of all pairs."""

import gzip
import json
import random

import numpy as np
import pytest

from minillm.data.prepare.counts import format_counts
from minillm.data.prepare.held_out import hash_runs
from minillm.data.prepare.run import prepare
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.units import ngrams, split_units
from minillm.errors import UserError

NGRAM = 9


def shares(text: str, other: str) -> bool:
    """Whether ``other`` has a run of NGRAM units of ``text``, or all of a text of 8 units."""
    units = split_units(text)
    n = min(NGRAM, len(units))
    return n >= 8 and bool({*ngrams(units, n)} & {*ngrams(split_units(other), n)})


def texts_of(path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def documents(write):
    """Documents of random words, some of which quote some of 30 passages of 5 to 12 words."""
    rng = random.Random(5)
    word = lambda: rng.choice("天地人日月水火木金土") if rng.random() < 0.5 else f" w{rng.randrange(3000)} "  # noqa: E731
    passages = ["".join(word() for _ in range(rng.randrange(5, 13))) for _ in range(30)]
    lines = []
    for _ in range(150):
        parts = ["".join(word() for _ in range(rng.randrange(4, 30)))]
        parts += rng.sample(passages, rng.choice([0, 0, 1, 2]))
        rng.shuffle(parts)
        lines.append({"text": "；".join(parts)})
    lines += [{"text": passage} for passage in passages[:8]]
    return write("raw.jsonl", lines)


@pytest.fixture
def go(documents, tmp_path):
    """go(**settings) → report, training texts, held-out texts."""

    def go(**settings):
        output = tmp_path / "out.jsonl"
        flags = {"valid_ratio": 0.3, "eval_ngram": NGRAM, "overwrite": True} | settings
        report = prepare(PrepareSettings(**{"data_path": str(documents), "output": str(output)} | flags))
        return report, texts_of(output), texts_of(tmp_path / "out_valid.jsonl")

    return go


def test_shared_passages_are_counted(go):
    report, train, valid = go()
    sharing = [text for text in valid if any(shares(text, other) for other in train)]
    too_short = sum(len(split_units(text)) < 8 for text in valid)
    passages = report["leakage"]["passages"]
    assert passages == {"held_out": len(valid), "too_short": too_short, "sharing": len(sharing)}
    assert 5 < len(sharing) < len(valid) - too_short
    assert too_short > 0
    assert f"{len(sharing):,} of {len(valid):,} held-out records" in format_counts(report)
    report, train_again, valid_again = go(valid_overlap="ignore")
    assert report["leakage"] == {"exact": 0, "passages": None}
    assert (train_again, valid_again) == (train, valid)


def test_they_are_dropped_with_the_record_that_they_share_with(go, documents, tmp_path):
    _, train, valid = go()
    report, train_after, valid_after = go(valid_overlap="drop", shuffle=True)
    assert sorted(train_after) == sorted(train)
    assert valid_after == [text for text in valid if not any(shares(text, other) for other in train)]
    assert report["dropped"] == {"shared_passage": len(valid) - len(valid_after)}
    dropped = gzip.decompress((tmp_path / "out.dropped.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(dropped) == len(valid) - len(valid_after)
    raw = texts_of(documents)
    for entry in map(json.loads, dropped):
        text, other = entry["record"]["text"], raw[entry["duplicate_of"]["line"] - 1]
        assert other == next(other for other in raw if other in train and shares(text, other))
        n = min(NGRAM, len(split_units(text)))
        runs = {*ngrams(split_units(text), n)}
        in_train = {run for other in train for run in ngrams(split_units(other), n)}
        assert entry["similarity"] == pytest.approx(len(runs & in_train) / len(runs), abs=1e-4)
        assert entry["reason"] == f"held out, and shares {NGRAM} words in a row with a training record"


def test_they_are_moved_with_those_that_then_share(go):
    _, train, valid = go()
    report, train_after, valid_after = go(valid_overlap="move")
    assert sorted(train_after + valid_after) == sorted(train + valid)
    assert set(train) < set(train_after)
    assert not any(shares(text, other) for text in valid_after for other in train_after)
    passages = report["leakage"]["passages"]
    assert passages["moved"] == len(valid) - len(valid_after) > passages["sharing"]
    assert f"{passages['moved']:,}, are in the training file" in format_counts(report)


def test_a_system_message_does_not_count(write, tmp_path):
    system = {"role": "system", "content": "You are a helpful assistant who answers all questions in one short line."}
    talk = lambda n: [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]  # noqa: E731
    path = write("chats.jsonl", [{"messages": [system, *talk(n)]} for n in range(40)])
    report = prepare(PrepareSettings(data_path=str(path), output=str(tmp_path / "a.jsonl"), valid_ratio=0.3))
    passages = report["leakage"]["passages"]
    assert passages["held_out"] == passages["too_short"] > 5
    assert passages["sharing"] == 0


def test_without_a_held_out_record_left_it_is_refused(write, tmp_path):
    path = write("raw.jsonl", [{"text": f"one two three four five six seven eight nine {n}"} for n in range(40)])
    settings = {"data_path": str(path), "output": str(tmp_path / "a.jsonl"), "eval_ngram": NGRAM}
    with pytest.raises(UserError, match="--valid_overlap drop leaves no held-out record"):
        prepare(PrepareSettings(**settings, valid_ratio=0.3, valid_overlap="drop"))
    with pytest.raises(UserError, match="--valid_overlap move: no record is held out; give --valid_ratio"):
        prepare(PrepareSettings(**settings, valid_overlap="move"))


def test_hashes_are_equal_exactly_where_runs_are():
    rng = random.Random(1)
    units = [rng.choice("ab猫") for _ in range(200)]
    for n in (1, 3, 8):
        hashes, runs = hash_runs(units, n), list(ngrams(units, n))
        assert len(hashes) == len(runs)
        assert len(np.unique(hashes)) == len(set(runs))
        assert all((hashes[i] == hashes[j]) == (runs[i] == runs[j]) for i in range(50) for j in range(50))
    assert len(hash_runs(units[:2], 3)) == 0
    assert not set(hash_runs(["a", "b"], 1)) & set(hash_runs(["a", "b"], 2))
