import json

import numpy as np
import pytest
import torch

from minillm.data.batches import collate
from minillm.data.chat import ChatRows
from minillm.errors import UserError
from minillm.tokenizer.chat import encode_chat

TRAIN_ON = ("all", "last", "per_turn")


def slow_targets(tokenizer, talks, max_seq_len, train_on):
    """Every (context, target) that is to be learned, straight from the chat encoding: the context is all
    tokens before the target, so it must stand in the row as a whole."""
    learned = []
    for talk in talks:
        ids, mask = encode_chat(tokenizer, talk, train_on="last" if train_on == "last" else "all")
        learned += [(tuple(ids[:t]), ids[t]) for t in range(1, len(ids)) if mask[t] and t <= max_seq_len]
    return sorted(learned)


def fast_targets(rows):
    learned = []
    for i in range(len(rows)):
        row = rows[i]
        for document in range(row["document_ids"].max() + 1):
            here = row["document_ids"] == document
            inputs, targets = row["input_ids"][here].tolist(), row["targets"][here].tolist()
            assert row["position_ids"][here].tolist() == list(range(len(inputs)))
            learned += [(tuple(inputs[: t + 1]), target) for t, target in enumerate(targets) if target != -100]
    return sorted(learned)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("train_on", TRAIN_ON)
@pytest.mark.parametrize("max_seq_len", [60, 90, 1000])
def test_targets_are_exactly_those_of_the_encoding(write, talks, tokenizer, tmp_path, packing, train_on, max_seq_len):
    path = write("a.jsonl", [{"messages": talk} for talk in talks])
    rows = ChatRows(path, tokenizer, max_seq_len=max_seq_len, train_on=train_on, packing=packing, cache_dir=tmp_path)
    expected = slow_targets(tokenizer, talks, max_seq_len, train_on)
    assert fast_targets(rows) == expected
    assert rows.n_targets == len(expected) == rows.target_counts.sum()
    assert rows.lengths.max() <= max_seq_len
    control = {tokenizer.im_end_id}
    assert rows.target_bytes == sum(len(tokenizer.token_bytes(t)) for _, t in expected if t not in control)
    assert rows.fixed_len == (max_seq_len if packing == "best_fit" else None)
    if packing == "none":
        assert all(rows[i]["document_ids"].max() == 0 for i in range(len(rows)))


def test_target_bytes_are_the_answers_bytes(write, talks, tokenizer, tmp_path):
    rows = ChatRows(write("a.jsonl", [{"messages": t} for t in talks]), tokenizer, max_seq_len=2000, cache_dir=tmp_path)
    answers = [m["content"] for talk in talks for m in talk if m["role"] == "assistant"]
    assert rows.target_bytes == sum(len(a.encode()) for a in answers)


def test_a_row_ends_at_its_last_target(write, talks, tokenizer, tmp_path):
    talk = [*talks[1], {"role": "user", "content": "no answer to this"}]
    rows = ChatRows(write("a.jsonl", [{"messages": talk}]), tokenizer, max_seq_len=2000, cache_dir=tmp_path)
    assert rows[0]["targets"][-1] == tokenizer.im_end_id


def test_cut_and_rejected_are_counted_and_explained(write, tokenizer, tmp_path):
    def talk(asked, answered):
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}

    short, long = "fox", " ".join(["fox"] * 60)
    first = write("a.jsonl", [talk(short, short), "{", talk(short, long), talk(long, short)])
    second = write("b.jsonl", [talk(long, short), talk(short, short)])
    settings = {"max_seq_len": 30, "cache_dir": tmp_path / "c"}
    rows = ChatRows([first, second], tokenizer, **settings)
    summary = rows.summary
    assert (summary["documents"], summary["cut"], summary["rejected"]) == (3, 1, 3)
    n_long = len(tokenizer.encode(long)) + 1
    n_short = len(tokenizer.encode(short)) + 1
    assert summary["targets_lost"] + rows.n_targets == n_long + 2 * n_short  # of the three that are in the rows
    assert (summary["records"], summary["usable"]) == (6, 3)
    assert [(r["count"], r["first"]) for r in summary["reasons"]] == [(2, f"{first}:4"), (1, f"{first}:2")]
    lines = {}
    for path in (first, second):
        rejected = (path.parent / (path.name + ".rejected.jsonl")).read_text("utf-8").splitlines()
        lines[path] = [(json.loads(r)["line"], json.loads(r)["reason"][:11]) for r in rejected]
    assert lines == {first: [(2, "broken JSON"), (4, "no target w")], second: [(1, "no target w")]}
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: no target within --max_seq_len 30"):
        ChatRows(second, tokenizer, strict=True, **settings)
    with pytest.raises(UserError, match=r"no conversation of .* within --max_seq_len 2"):
        ChatRows(first, tokenizer, max_seq_len=2, cache_dir=tmp_path / "c")
    assert rows.log_prob is None


def test_one_cache_serves_every_setting(write, talks, tokenizer, tmp_path):
    path = write("a.jsonl", [{"messages": talk} for talk in talks])
    hashes = set()
    for train_on in TRAIN_ON:
        for seed in (0, 1):
            rows = ChatRows(path, tokenizer, max_seq_len=99, train_on=train_on, seed=seed, cache_dir=tmp_path / "c")
            hashes.add(rows.data_hash)
    assert len(hashes) == 6
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_errors(write, talks, tokenizer, tmp_path):
    chat, text = write("a.jsonl", [{"messages": talks[0]}]), write("b.jsonl", [{"text": "fox"}])
    for path, settings, reason in [
        (chat, {"max_seq_len": 0}, "--max_seq_len 0"),
        (chat, {"max_seq_len": 9, "packing": "stream"}, "best_fit, none"),
        (chat, {"max_seq_len": 9, "train_on": "first"}, "all, last, per_turn"),
        (text, {"max_seq_len": 9}, "a text record, where chat"),
    ]:
        with pytest.raises(UserError, match=reason):
            ChatRows(path, tokenizer, cache_dir=tmp_path / "c", **settings)


def test_which_of_the_three_agree_in_their_gradients(write, talks, tokenizer, tmp_path):
    """ "all" and "per_turn" agree: attention is causal, so a turn is predicted from the same history, at the same
    positions, whether or not later turns stand behind it in the row; the same terms are only added in another
    order. "last" leaves out the terms of all turns but the last: another objective, another gradient."""
    from minillm.config import ModelConfig
    from minillm.losses import causal_lm_loss
    from minillm.model import Transformer

    path = write("a.jsonl", [{"messages": talk} for talk in talks[:12]])
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.2,
    )  # fmt: skip
    model = Transformer(config).double()

    def sums(train_on, packing, max_seq_len):
        model.zero_grad()
        rows = ChatRows(
            path, tokenizer, max_seq_len=max_seq_len, train_on=train_on, packing=packing, cache_dir=tmp_path
        )
        loss_sum, n_targets = causal_lm_loss(model, collate([rows[i] for i in range(len(rows))], rows.fixed_len))
        loss_sum.backward()
        assert float(n_targets) == rows.n_targets
        return float(loss_sum.detach()), float(n_targets), {n: p.grad.clone() for n, p in model.named_parameters()}

    def distance(a, b):
        return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)

    for max_seq_len in (400, 60):  # 60 cuts some of them
        loss, n_targets, gradients = sums("all", "best_fit", max_seq_len)
        for train_on, packing in (("per_turn", "best_fit"), ("per_turn", "none"), ("all", "none")):
            other_loss, other_n, other = sums(train_on, packing, max_seq_len)
            assert other_n == n_targets
            assert abs(other_loss / loss - 1) <= 1e-12
            assert distance(other, gradients) <= 1e-12
        _, last_n, last = sums("last", "best_fit", max_seq_len)
        assert last_n < n_targets
        assert distance(last, gradients) > 0.1


def test_fill_of_packed_rows(write, talks, tokenizer, tmp_path):
    path = write("a.jsonl", [{"messages": talk} for talk in talks * 30])
    rows = ChatRows(path, tokenizer, max_seq_len=1024, cache_dir=tmp_path)
    assert rows.summary["fill"] > 0.98
    assert np.isclose(rows.summary["fill"], rows.lengths.sum() / (1024 * len(rows)))
