"""Perplexity against one forward pass per target."""

import math
import sys

import pytest
import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.data.records import read_records
from minillm.errors import UserError
from minillm.evaluation import perplexity
from minillm.kernels import linear_log_probs
from minillm.lora import apply_lora, merge_lora
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

TEXTS = ["the cat", "", "你好,世界 🙂", "a much longer text than the others, with 123 numbers", "b"]


def tiny_model(**overrides):
    shape = {"vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**(shape | overrides)))


@pytest.fixture(scope="module")
def model():
    return tiny_model().double()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the cat the cat"] * 3), vocab_size=270)


def slow_loss(model, tokenizer, text, max_seq_len, overlap):
    """−Σ log p in nats, each target from a forward pass of its own over what its window shows before it."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id]
    total, stride = 0.0, max_seq_len - overlap
    for place in range(1, len(ids)):
        n_skipped_windows = max(0, math.ceil((place - max_seq_len) / stride))
        context = ids[n_skipped_windows * stride : place]
        assert len(context) == place or max(1, overlap) <= len(context) <= max_seq_len
        with torch.no_grad():
            log_probs = model(torch.tensor([context]))[0, -1].double().log_softmax(-1)
        total -= log_probs[ids[place]].item()
    return total, len(ids) - 1


@pytest.mark.parametrize(("max_seq_len", "overlap"), [(64, 32), (16, 8), (16, 0), (7, 3), (5, 4), (1, 0)])
def test_equals_the_slow_formula_for_any_window_and_batch(model, tokenizer, max_seq_len, overlap):
    slow = [slow_loss(model, tokenizer, text, max_seq_len, overlap) for text in TEXTS]
    for batch_size in (1, 4, 100):
        result = perplexity(model, TEXTS, tokenizer, max_seq_len=max_seq_len, overlap=overlap, batch_size=batch_size)
        assert result.loss_sum == pytest.approx(sum(loss for loss, _ in slow), rel=1e-12)
        assert result.n_targets == sum(n for _, n in slow)
        assert result.n_bytes == sum(len(text.encode()) for text in TEXTS)
        assert result.n_texts == len(TEXTS)


def test_ratios(model, tokenizer):
    result = perplexity(model, TEXTS, tokenizer)
    assert result.nats_per_token == result.loss_sum / result.n_targets
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.bits_per_byte == pytest.approx(result.loss_sum / math.log(2) / result.n_bytes)
    assert result.floor is result.gap is result.gap_bits_per_byte is None
    assert perplexity(model, [""], tokenizer).bits_per_byte is None


def test_a_model_that_knows_nothing_is_at_ln_v(tokenizer):
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    result = perplexity(model, TEXTS, tokenizer)
    assert result.nats_per_token == pytest.approx(math.log(270), rel=1e-6)


def test_kinds_and_floor(model, tokenizer):
    records = [
        {"text": "the cat", "kind": "facts", "log_prob": -3.0},
        {"text": "cat the", "kind": "facts", "log_prob": -4.5},
        {"text": "12+3", "kind": "sums", "log_prob": -2.0},
        {"text": "cat", "kind": "sums"},
    ]
    result = perplexity(model, records, tokenizer)
    facts, sums = result.by_kind["facts"], result.by_kind["sums"]
    alone = perplexity(model, ["the cat", "cat the"], tokenizer)
    assert facts.loss_sum == pytest.approx(alone.loss_sum, rel=1e-12)
    assert facts.floor == 7.5 / facts.n_targets
    assert facts.gap == pytest.approx(facts.nats_per_token - facts.floor)
    assert facts.gap_bits_per_byte == pytest.approx((facts.loss_sum - 7.5) / math.log(2) / 14)
    assert sums.floor is None  # one of its records has no log_prob
    assert result.floor is None
    assert result.loss_sum == pytest.approx(facts.loss_sum + sums.loss_sum)
    assert result.n_targets == facts.n_targets + sums.n_targets
    assert perplexity(model, records[:3], tokenizer).floor == pytest.approx(
        9.5 / result_targets(records[:3], tokenizer)
    )
    table = result.table().splitlines()
    assert [line.split()[0] for line in table] == ["kind", "facts", "sums", "all"]
    assert "floor" in table[0]
    assert "floor" not in perplexity(model, ["a"], tokenizer).table()
    values = result.as_dict()
    assert values["by_kind"]["facts"]["gap"] == facts.gap
    assert values["nats_per_token"] == result.nats_per_token


def result_targets(records, tokenizer):
    return sum(len(tokenizer.encode(record["text"])) + 1 for record in records)


def test_records_from_a_file(model, tokenizer, tmp_path):
    path = tmp_path / "valid.jsonl"
    path.write_text('{"text": "the cat", "kind": "facts", "log_prob": -3.0}\n{"text": "12"}\n')
    result = perplexity(model, read_records(path), tokenizer)
    assert result.by_kind["facts"].log_prob == -3.0
    assert result.n_texts == 2


def test_a_wrapped_output_layer_gives_the_same(model, tokenizer):
    class WithoutHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids, *, head=None, **more):
            return self.inner(input_ids, **more)

    direct = perplexity(model, TEXTS, tokenizer, max_seq_len=16)
    assert perplexity(WithoutHead(), TEXTS, tokenizer, max_seq_len=16).loss_sum == pytest.approx(direct.loss_sum)


def test_an_adapted_output_layer_gives_the_same(tokenizer):
    model = tiny_model().double()
    apply_lora(model, rank=2, target_modules="lm_head")
    nn.init.normal_(model.lm_head.lora.B.weight, std=0.3)
    adapted = perplexity(model, TEXTS, tokenizer, max_seq_len=16).loss_sum
    merge_lora(model, keep_base=False)
    assert adapted == pytest.approx(perplexity(model, TEXTS, tokenizer, max_seq_len=16).loss_sum)
    assert adapted != pytest.approx(perplexity(tiny_model().double(), TEXTS, tokenizer, max_seq_len=16).loss_sum)


def test_logits_in_chunks_give_the_same(model, tokenizer, monkeypatch):
    whole = perplexity(model, TEXTS, tokenizer)
    monkeypatch.setattr(linear_log_probs, "CHUNK_NUMEL", 3 * 270)
    monkeypatch.setattr(sys.modules[perplexity.__module__], "TEXTS_AT_ONCE", 2)
    assert perplexity(model, TEXTS, tokenizer).loss_sum == pytest.approx(whole.loss_sum, rel=1e-12)


def test_low_precision_weights_are_summed_in_float64(tokenizer):
    model = tiny_model().bfloat16()
    result = perplexity(model, TEXTS, tokenizer)
    exact = perplexity(tiny_model().bfloat16().double(), TEXTS, tokenizer)
    # The same bfloat16 weights; only the products differ, by about 2^-8 each.
    assert result.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.02)


def test_logits_of_low_precision_are_summed_in_float32(tokenizer):
    """A logit near 60 has steps of 0.25 in bfloat16: rounded there, the loss of a sure model is off by that much."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(60)
    model = model.bfloat16()
    hidden = []
    model.model.norm.register_forward_hook(lambda _, __, output: hidden.append(output))
    result = perplexity(model, TEXTS[:1], tokenizer)
    ids = tokenizer.document(tokenizer.encode(TEXTS[0]))
    logits = hidden[0][0].double() @ model.lm_head.weight.double().T
    exact = torch.nn.functional.cross_entropy(logits[: len(ids) - 1], torch.tensor(ids[1:]), reduction="sum")
    assert result.loss_sum == pytest.approx(exact.item(), rel=1e-5)


def test_training_mode_comes_back(tokenizer):
    model = tiny_model().train()
    perplexity(model, ["a"], tokenizer)
    assert model.training


def test_bad_input_is_named(model, tokenizer):
    for texts, options, message in [
        ([], {}, "no texts"),
        ([{"conversations": []}], {}, "record 0 has no text"),
        (["a"], {"max_seq_len": 65}, "max_seq_len 65"),
        (["a"], {"max_seq_len": 0}, "max_seq_len 0"),
        (["a"], {"max_seq_len": 8, "overlap": 8}, "overlap 8"),
        (["a"], {"batch_size": 0}, "batch_size 0"),
    ]:
        with pytest.raises(UserError, match=message):
            perplexity(model, texts, tokenizer, **options)
    with pytest.raises(UserError, match=r"tokenizer has 270.*embedding 269"):
        perplexity(tiny_model(vocab_size=269), ["a"], tokenizer)
