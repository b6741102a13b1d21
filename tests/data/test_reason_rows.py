"""Rows of reasoned answers: which targets weigh more, and which records are set aside."""

import json

import numpy as np
import pytest

from minillm.data import ChatRows, ReasonRows, ReplayRows, StepBatches, collate
from minillm.data.packing import IGNORE_INDEX
from minillm.data.reasoning import TAGS
from minillm.errors import UserError
from minillm.losses import count_targets
from minillm.tokenizer import encode_chat
from minillm.tokenizer.base import Tokenizer

FORM = "<think>\n{}\n</think>\n<answer>\n{}\n</answer>"


def say(question, answer, **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def thought(n):
    return FORM.format(f"12+{n}=" + " 345" * (n % 4), n)


@pytest.fixture
def talks():
    """Conversations of one and two turns; some users write tags, one first answer is plain."""
    talks = [say(f"how many apples? {n}" + " <think></answer>" * (n % 2), thought(n)) for n in range(12)]
    talks.append(say("the fox?", "an old fox") + say("and the dog?", thought(3)))
    talks.append(say("the river?", thought(5)) + say("<answer>", thought(7)))
    return talks


@pytest.fixture
def make(write, tokenizer, tmp_path):
    def make(talks, kind=ReasonRows, **settings):
        path = write("reason.jsonl", [t if isinstance(t, (dict, str)) else {"messages": t} for t in talks])
        return kind(path, tokenizer, **({"max_seq_len": 120, "cache_dir": tmp_path / "c"} | settings))

    return make


def weighed(rows):
    """Every (context, target, weight) in the rows, sorted."""
    found = []
    for row in map(rows.__getitem__, range(len(rows))):
        for document in range(row["document_ids"].max() + 1):
            here = row["document_ids"] == document
            inputs = row["input_ids"][here].tolist()
            pairs = zip(row["targets"][here].tolist(), row["weights"][here].tolist(), strict=True)
            found += [(tuple(inputs[: t + 1]), *pair) for t, pair in enumerate(pairs) if pair[0] != IGNORE_INDEX]
    return sorted(found)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("train_on", ["all", "last", "per_turn"])
@pytest.mark.parametrize("max_seq_len", [40, 120])
def test_tags_of_answers_weigh_more_and_nothing_else_does(make, talks, tokenizer, packing, train_on, max_seq_len):
    expected, tags = [], {tokenizer.token_id(tag) for tag in TAGS}
    for talk in talks:
        ids, mask = encode_chat(tokenizer, talk, train_on="last" if train_on == "last" else "all")
        for t in range(1, min(len(ids), max_seq_len + 1)):
            if mask[t]:
                expected.append((tuple(ids[:t]), ids[t], 7.5 if ids[t] in tags else 1.0))
    rows = make(talks, tag_weight=7.5, packing=packing, train_on=train_on, max_seq_len=max_seq_len)
    assert weighed(rows) == sorted(expected)
    heavy = sum(weight == 7.5 for *_, weight in expected)
    assert heavy == 4 * len(talks) + (4 if train_on != "last" else 0) if max_seq_len == 120 else heavy > 0
    columns = [rows[i] for i in range(len(rows))]
    assert {row["weights"].dtype for row in columns} == {np.dtype(np.float32)}
    batch = collate(columns, rows.fixed_len)
    assert count_targets(batch["targets"], batch["weights"]).item() == sum(weight for *_, weight in expected)


def test_a_users_tag_is_text_of_weight_one(make, tokenizer):
    (row,) = make([say("a <think> b", FORM.format("c", "d"))], tag_weight=10.0, packing="none")
    is_target = row["targets"] != IGNORE_INDEX
    assert not np.isin(row["input_ids"][: is_target.argmax()], [tokenizer.token_id(tag) for tag in TAGS]).any()
    assert "<think>" in tokenizer.decode(row["input_ids"][: is_target.argmax()].tolist())
    assert (row["weights"][~is_target] == 1).all()
    assert row["weights"][is_target].tolist() == [
        10 if text in TAGS else 1 for text in (tokenizer.decode([t]) for t in row["targets"][is_target].tolist())
    ]
    assert (row["weights"] == 10).sum() == 4


def test_reasoning_content_is_thinking(make, tmp_path):
    one = make([say("a", FORM.format("b\n\nc", "d"))], tag_weight=3.0)
    other = make([say("a", "<answer>\nd\n</answer>", reasoning_content="b\n\nc")], tag_weight=3.0)
    assert weighed(one) == weighed(other)


def test_counts_are_those_of_the_same_chats(make, talks):
    plain, rows = make(talks, kind=ChatRows), make(talks, tag_weight=10.0)
    assert rows.n_targets == plain.n_targets == rows.target_counts.sum()
    assert (rows.target_counts == plain.target_counts).all()
    assert rows.target_bytes == plain.target_bytes
    assert rows.summary == plain.summary
    for i in range(len(rows)):
        for name, column in plain[i].items():
            assert (rows[i][name] == column).all()


def test_the_floor_is_kept_where_all_weigh_one(make, talks):
    talks = [{"messages": talk, "log_prob": -2.5} for talk in talks]
    assert make(talks, kind=ChatRows).log_prob == make(talks, tag_weight=1.0).log_prob == -2.5 * len(talks)
    assert make(talks, tag_weight=2.0).log_prob is None


def test_the_weight_is_in_the_hash(make, talks):
    kinds = [{"tag_weight": 1.0}, {"tag_weight": 2.0}, {"tag_weight": 2.0, "seed": 1}, {"kind": ChatRows}]
    assert len({make(talks, **kind).data_hash for kind in kinds}) == 4
    assert make(talks, tag_weight=2.0).data_hash == make(talks, tag_weight=2.0).data_hash


def test_replayed_rows_weigh_one(make, talks):
    rows = ReplayRows(make(talks, tag_weight=10.0), make(talks, kind=ChatRows), share=0.5)
    batches = StepBatches(rows, batch_size=len(rows), global_batch_size=len(rows))
    (batch,) = batches.step(0, 0)
    n_tags = 4 * (len(talks) + 1)
    assert (batch["weights"] == 10).sum() == n_tags  # in the new rows, though both hold the same texts
    n_targets = 2 * int(rows.new.n_targets)
    assert count_targets(batch["targets"], batch["weights"]).item() == n_targets + 9 * n_tags


BAD = {
    "there is no <think>": say("a", "plain"),
    "<think> is never closed": say("a", "<think>b<answer>c</answer>"),
    "is empty": say("a", FORM.format("b", " ")),
    "outside of the blocks": say("a", FORM.format("b", "c") + " d"),
    "a text record, where chat records are expected": {"text": "the fox"},
    "no <answer>": say("a", "only words", reasoning_content="thought"),
    "the tags are": say("a", FORM.format("b", "c"), reasoning_content="thought"),
}


@pytest.mark.parametrize("reason", BAD)
def test_an_answer_without_the_form_is_a_bad_line(make, talks, tmp_path, reason):
    records = [*talks[:2], BAD[reason], talks[2]]
    rows = make(records, tag_weight=10.0)
    assert (rows.summary["documents"], rows.summary["rejected"]) == (3, 1)
    assert weighed(rows) == weighed(make(talks[:3], tag_weight=10.0))
    rows = make(records, tag_weight=10.0)
    (rejected,) = map(json.loads, (tmp_path / "reason.jsonl.rejected.jsonl").read_text("utf-8").splitlines())
    assert rejected["line"] == 3
    assert reason in rejected["reason"]
    for cache in ("c", "fresh"):  # tokenised before, and not
        with pytest.raises(UserError, match=r"reason\.jsonl, line 3: ") as raised:
            make(records, tag_weight=10.0, strict=True, cache_dir=tmp_path / cache)
        assert reason in str(raised.value)
    with pytest.raises(UserError, match=r"no usable record; the first, line 1: "):
        make([BAD[reason]], tag_weight=10.0)


def test_the_last_answer_decides_though_a_question_follows(make):
    rows = make([[*say("a", FORM.format("b", "c")), {"role": "user", "content": "no answer"}]], tag_weight=10.0)
    assert rows.summary["documents"] == 1
    with pytest.raises(UserError, match="there is no <think>"):
        make([say("a", FORM.format("b", "c")) + say("d", "plain")], tag_weight=10.0)


def test_as_plain_chats_the_same_file_is_all_good(make, talks):
    """The two kinds must not share what is cached: as chats the first record is good, as reasoned answers it is not."""
    records = [say("a", "plain"), *talks]
    assert make(records, kind=ChatRows).summary["rejected"] == 0
    assert make(records, tag_weight=10.0).summary["rejected"] == 1
    assert make(records, kind=ChatRows).summary["rejected"] == 0


@pytest.mark.parametrize("tag_weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_out_of_range_is_refused(make, talks, tag_weight):
    with pytest.raises(UserError, match=f"--tag_weight {tag_weight}: must be positive"):
        make(talks, tag_weight=tag_weight)


def test_a_tokenizer_without_the_tags_is_refused(write, talks, tokenizer, tmp_path):
    """There ``<answer>`` would be several tokens, and its weight would fall on parts of other words."""
    spec = json.loads(tokenizer.files["tokenizer.json"])
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "answer" not in token["content"]]
    spec["model"]["vocab"] = {t: n for t, n in spec["model"]["vocab"].items() if "answer>" not in t}
    foreign = Tokenizer(tokenizer.files | {"tokenizer.json": json.dumps(spec)}, origin="theirs")
    path = write("a.jsonl", [{"messages": talk} for talk in talks])
    settings = {"max_seq_len": 300, "cache_dir": tmp_path / "c"}
    assert ChatRows(path, foreign, **settings).summary["rejected"] == 0
    with pytest.raises(UserError, match=r"theirs has no single token for <answer>, </answer>.*train_sft\.py"):
        ReasonRows(path, foreign, tag_weight=10.0, **settings)
