"""Preferences against one forward pass per token, with all logits."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data.schema import parse_record
from minillm.errors import UserError
from minillm.evaluation import PreferenceScore, like_chosen, preference_accuracy
from minillm.evaluation.preference import PairScore
from minillm.lora import apply_lora, merge_lora
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the cat"]), vocab_size=267)


def tiny_model():
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape, max_position_embeddings=80, initializer_range=0.3)).double().eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def turn(role, content):
    return {"role": role, "content": content}


EARLIER = [turn("system", "be brief"), turn("user", "who?"), turn("assistant", "b"), turn("user", "and?")]
TOOL = [turn("assistant", "looking"), turn("tool", "4"), turn("assistant", "four")]
PAIRS = [("a", "the cat", "c"), (EARLIER, "b", "你好 there"), ("?", "the longest of all", "no"), ("b", TOOL, "e")]
RECORDS = [parse_record({"prompt": prompt, "chosen": one, "rejected": other}, 1) for prompt, one, other in PAIRS]


def slow_log_prob(model, tokenizer, prompt, reply):
    """Σ log p of the reply's last turn and its end, each from a forward pass of its own, and the number of tokens."""
    turns = [*prompt, *reply]
    before, _ = encode_chat(tokenizer, turns[:-1], add_generation_prompt=True)
    ids, _ = encode_chat(tokenizer, turns)
    end = len(ids) - ids[::-1].index(tokenizer.im_end_id)  # the newline behind it is not the reply's
    total = 0.0
    for place in range(len(before), end):
        with torch.no_grad():
            total += model(torch.tensor([ids[:place]]))[0, -1].log_softmax(-1)[ids[place]].item()
    return total, end - len(before)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_the_slow_formula_for_any_batch(model, tokenizer, batch_size):
    score = preference_accuracy(model, tokenizer, iter(RECORDS), batch_size=batch_size)
    assert len(score.pairs) == len(RECORDS)
    for record, pair in zip(RECORDS, score.pairs, strict=True):
        chosen, n_chosen = slow_log_prob(model, tokenizer, record.messages, record.chosen)
        rejected, n_rejected = slow_log_prob(model, tokenizer, record.messages, record.rejected)
        assert pair.chosen == pytest.approx(chosen, rel=1e-12)
        assert pair.rejected == pytest.approx(rejected, rel=1e-12)
        assert (pair.n_chosen, pair.n_rejected) == (n_chosen, n_rejected)


def test_replies_changed_over_change_sides(model, tokenizer):
    over = [parse_record({"prompt": r.messages, "chosen": r.rejected, "rejected": r.chosen}, 1) for r in RECORDS]
    score, other = (preference_accuracy(model, tokenizer, records) for records in (RECORDS, over))
    assert other.accuracy == pytest.approx(1 - score.accuracy)
    assert other.mean_margin == pytest.approx(-score.mean_margin)


def test_an_adapted_output_layer_gives_the_same(tokenizer):
    """It has no weight that a product could be taken with piece by piece: the logits come whole."""
    model = tiny_model()
    apply_lora(model, rank=2, target_modules="lm_head")
    torch.nn.init.normal_(model.lm_head.lora.B.weight, std=0.3)
    adapted = preference_accuracy(model, tokenizer, RECORDS)
    merge_lora(model, keep_base=False)
    merged = preference_accuracy(model, tokenizer, RECORDS)
    assert adapted.mean_margin == pytest.approx(merged.mean_margin, rel=1e-9)
    assert merged.mean_margin != preference_accuracy(tiny_model(), tokenizer, RECORDS).mean_margin


def test_figures_by_hand():
    """A long reply may lose as a whole and win per token; equal ones do not count as right."""
    pairs = [
        PairScore(chosen=-6.0, rejected=-4.0, n_chosen=6, n_rejected=2),
        PairScore(chosen=-1.0, rejected=-4.0, n_chosen=1, n_rejected=8),
        PairScore(chosen=-3.0, rejected=-3.0, n_chosen=3, n_rejected=3),
        PairScore(chosen=-2.0, rejected=-6.0, n_chosen=2, n_rejected=3),
    ]
    score = PreferenceScore(pairs=pairs)
    assert [PreferenceScore(pairs=[pair]).accuracy for pair in pairs] == [0, 1, 0, 1]
    assert [PreferenceScore(pairs=[pair]).accuracy_per_token for pair in pairs] == [1, 0, 0, 1]
    assert (score.accuracy, score.accuracy_per_token) == (2 / 4, 2 / 4)
    assert score.mean_margin == (-2 + 3 + 0 + 4) / 4
    values = score.as_dict()
    assert (values["mean_log_prob_chosen"], values["mean_log_prob_rejected"]) == (-3.0, -17 / 4)
    assert (values["mean_tokens_chosen"], values["mean_tokens_rejected"]) == (3.0, 4.0)
    assert values["pairs"][1]["n_rejected"] == 8
    assert "pairs" not in score.as_dict(pairs=False)
    assert (
        PreferenceScore(pairs=pairs[1:])
        .table()
        .startswith("the chosen reply is more probable in 66.7% of 3 pairs, per token in 33.3%\n")
    )
    lines = [line.split() for line in score.table().splitlines()]
    assert lines[-3:] == [["chosen", "-3.000", "3.0"], ["rejected", "-4.250", "4.0"], ["margin", "1.250"]]


def test_bad_records_are_named(model, tokenizer):
    chat = parse_record({"messages": [turn("user", "a"), turn("assistant", "b")]}, 7)
    long = [parse_record({"prompt": "a", "chosen": "b", "rejected": "x" * 90}, 1)]
    for records, words in [
        ([], "no records"),
        ([RECORDS[0], chat], "record 1 .line 7. is a chat record: give preferences"),
        ([RECORDS[0], *long], "record 1 has 1.. tokens with its rejected reply and the model reads 80"),
    ]:
        with pytest.raises(UserError, match=words):
            preference_accuracy(model, tokenizer, records)


def test_free_answers_are_like_one_reply_or_the_other(model, tokenizer, monkeypatch):
    module = importlib.import_module("minillm.evaluation.exact_match")
    said = iter(["the cat sat", " c\n", "no", "xyz"])
    asked = []

    def complete(model, prompts, *, max_new_tokens, temperature, eos_token_id, stop, tokenizer):
        asked.extend(prompts)
        assert (max_new_tokens, temperature) == (9, 0.0)
        return [SimpleNamespace(text=next(said)) for _ in prompts]

    monkeypatch.setattr(module, "complete", complete)
    records = [RECORDS[0], RECORDS[0], RECORDS[2], RECORDS[3]]
    found = like_chosen(model, tokenizer, records, max_new_tokens=9, batch_size=3)
    assert [answer.answer for answer in found] == ["the cat sat", "c", "no", "xyz"]
    assert [answer.like_chosen for answer in found] == [True, False, False, False]  # like neither is not like chosen
    prompt = encode_chat(tokenizer, [turn("user", "a")], add_generation_prompt=True)[0]
    assert asked[0] == prompt
