"""The loss of expected answers against one forward pass per target."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation import answer_loss
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the cat"]), vocab_size=267)


@pytest.fixture(scope="module")
def model():
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return Transformer(ModelConfig(**shape, max_position_embeddings=160, initializer_range=0.3)).double().eval()


def said(*texts):
    roles = ("user", "assistant") * len(texts)
    return {"conversations": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}


RECORDS = [said("a", "the cat"), said("who?", "b", "and?", "你好"), said("?", "the longest of all answers")]
RECORDS.append(said("a", "the cat") | {"tools": [{"type": "function", "function": {"name": "f"}}]})


def slow_loss(model, tokenizer, record):
    """−Σ log p of the last turn and its end, each from a forward pass of its own."""
    turns, tools = record["conversations"], record.get("tools")
    ids, _ = encode_chat(tokenizer, turns, tools=tools)
    prompt, _ = encode_chat(tokenizer, turns[:-1], tools=tools, add_generation_prompt=True)
    end = len(ids) - ids[::-1].index(tokenizer.im_end_id)  # the newline behind it is not the answer's
    total = 0.0
    for place in range(len(prompt), end):
        with torch.no_grad():
            total -= model(torch.tensor([ids[:place]]))[0, -1].log_softmax(-1)[ids[place]].item()
    return total, end - len(prompt)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_equals_the_slow_formula_for_any_batch(model, tokenizer, batch_size):
    slow = [slow_loss(model, tokenizer, record) for record in RECORDS]
    found = answer_loss(model, tokenizer, RECORDS, batch_size=batch_size)
    assert found.n_targets == sum(n for _, n in slow)
    assert found.loss_sum == pytest.approx(sum(loss for loss, _ in slow), rel=1e-12)
    assert found.as_dict()["nats_per_token"] == found.loss_sum / found.n_targets


def test_bad_records_are_named(model, tokenizer):
    for records, words in [
        ([], "no records"),
        ([RECORDS[0], {"text": "a"}], "record 1"),
        ([RECORDS[0], said("x" * 170, "b")], "record 1 has .* tokens and the model reads 160"),
    ]:
        with pytest.raises(UserError, match=words):
            answer_loss(model, tokenizer, records)
