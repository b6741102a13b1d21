"""Samples for the summary page: from the file's first usable records, the same at every call, never fatal."""

import json

import pytest
import torch

from minillm.config import ModelConfig
from minillm.inference import generate
from minillm.inference.samples import MAX_NEW_TOKENS, sample_answers, sample_completions
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the fox " * 9]), vocab_size=270)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, max_position_embeddings=256, **shape)
    return Transformer(config).eval()


@pytest.fixture
def write(tmp_path):
    def write(*records):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (tmp_path / "data.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return [str(tmp_path / "data.jsonl"), "never/opened.jsonl"]

    return write


def talk(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]}


def expected(model, tokenizer, prompts, end):
    generator = torch.Generator().manual_seed(0)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.7, "top_p": 0.9, "eos_token_id": end}
    answers = generate(model, prompts, **options, generator=generator)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def test_completions_go_on_from_a_quarter_of_each_text(model, tokenizer, write):
    texts = ["the fox saw a dog and a bird", "x", "abc " * 99, "four", "never seen"]
    beginnings = [tokenizer.encode(text) for text in texts[:4]]
    beginnings = [ids[: max(1, min(len(ids) // 4, 32))] for ids in beginnings]
    assert [len(ids) for ids in beginnings][1:3] == [1, 32]  # at least one token, at most 32
    samples = sample_completions(model, tokenizer, write(*({"text": text} for text in texts)))
    assert [beginning for beginning, _ in samples] == [tokenizer.decode(ids) for ids in beginnings]
    prompts = [[tokenizer.bos_token_id, *ids] for ids in beginnings]
    assert [text for _, text in samples] == expected(model, tokenizer, prompts, tokenizer.end_ids)


def test_answers_to_the_first_question_of_each_conversation(model, tokenizer, write):
    files = write(talk("one", "a", "later", "b"), talk("two", "c"), talk("never seen", "d"))
    samples = sample_answers(model, tokenizer, files, n_samples=2)
    assert [question for question, _ in samples] == ["one", "two"]
    prompts = [
        encode_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)[0]
        for question in ("one", "two")
    ]
    assert [answer for _, answer in samples] == expected(model, tokenizer, prompts, tokenizer.end_ids)


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_global_generator_is_left_alone_and_every_call_draws_the_same(model, tokenizer, write, kind):
    files = write({"text": "the fox"}, {"text": "a dog"}) if kind == "text" else write(talk("one", "a"))
    sample = sample_completions if kind == "text" else sample_answers
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(model, tokenizer, files)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert sample(model, tokenizer, files) == first


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_bad_lines_are_passed_over(model, tokenizer, write, kind):
    """The data was accepted with bad lines set aside; the end of the training is no place to stumble over them."""
    good = [{"text": "the fox"}, {"text": "a dog"}] if kind == "text" else [talk("one", "a"), talk("two", "b")]
    sample = sample_completions if kind == "text" else sample_answers
    samples = sample(model, tokenizer, write("{", good[0], {"other": 1}, good[1]))
    assert samples == sample(model, tokenizer, write(*good))


def test_the_report_of_bad_lines_is_left_as_it_is(model, tokenizer, write, tmp_path):
    report = tmp_path / "data.jsonl.rejected.jsonl"
    report.write_text("what training found")
    sample_answers(model, tokenizer, write("{", talk("one", "a")))
    assert report.read_text() == "what training found"
    assert sample_answers(model, tokenizer, write(talk("hello", first="assistant"))) == []


def test_a_conversation_without_a_question_is_passed_over(model, tokenizer, write):
    samples = sample_answers(model, tokenizer, write(talk("hello", first="assistant"), talk("one", "a")))
    assert [question for question, _ in samples] == ["one"]


def test_a_question_longer_than_the_model_is_passed_over(model, tokenizer, write):
    """Training cuts such a conversation; the samples must not end the run after its last step."""
    samples = sample_answers(model, tokenizer, write(talk("@" * 400, "a"), talk("one", "a")))
    assert [question for question, _ in samples] == ["one"]
