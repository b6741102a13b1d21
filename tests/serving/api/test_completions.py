"""Completions with the real client: texts, ids and lists of both, whole and streamed."""

import json
import math

import pytest
import torch

from minillm.serving import LogProb
from minillm.serving.api import answers


def test_a_text_is_continued_from_the_beginning_of_a_document(client, single, tokenizer):
    ids = tokenizer.open_document(tokenizer.encode("I am"))
    expected = single(ids, max_new_tokens=20)
    answer = client.completions.create(model="tiny", prompt="I am", temperature=0, max_tokens=20)
    assert (answer.object, answer.choices[0].text) == ("text_completion", expected.text)
    assert answer.usage.prompt_tokens == len(ids)
    chunks = list(client.completions.create(model="tiny", prompt="I am", temperature=0, max_tokens=20, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == "length"
    short = client.completions.create(model="tiny", prompt="I am", temperature=0)
    assert short.usage.completion_tokens == 16  # OpenAI's default


def test_ids_are_taken_as_they_are(client, single):
    ids = [9, 40, 41, 2]
    answer = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=9)
    assert answer.choices[0].text == single(ids, max_new_tokens=9).text
    assert answer.usage.prompt_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_choices_each(client, single, stream):
    prompts = [[9, 40, 41], [50], [60, 61, 62, 63, 64, 65]]
    options = {"prompt": prompts, "max_tokens": 10, "n": 2, "seed": 3, "stream": stream}
    expected = [single(p, max_new_tokens=10, temperature=1, seed=3 + i).text for p in prompts for i in range(2)]
    answer = client.completions.create(model="tiny", **options)
    if stream:
        texts = [""] * 6
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == expected
    else:
        assert [choice.text for choice in answer.choices] == expected
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 60)


def test_texts_in_a_list(client):
    both = client.completions.create(model="tiny", prompt=["I", "am"], temperature=0)
    alone = [client.completions.create(model="tiny", prompt=text, temperature=0) for text in ("I", "am")]
    assert [choice.text for choice in both.choices] == [answer.choices[0].text for answer in alone]


def test_the_name_of_a_special_token_stays_text(client, tokenizer):
    answer = client.completions.create(model="tiny", prompt="<|im_end|>", max_tokens=1)
    assert answer.usage.prompt_tokens == 1 + len(tokenizer.encode("<|im_end|>")) > 2


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_as_lists(client, model, tokenizer, single, stream):
    ids = tokenizer.open_document(tokenizer.encode("I am"))
    new = single(ids, max_new_tokens=8).ids
    with torch.inference_mode():
        log_probs = model(torch.tensor([ids + new]))[0].log_softmax(-1)[len(ids) - 1 : -1]
    options = {"model": "tiny", "prompt": "I am", "temperature": 0, "max_tokens": 8, "logprobs": 2}
    answer = client.completions.create(**options, stream=stream)
    listed = [chunk.choices[0].logprobs for chunk in (answer if stream else [answer])]
    tokens = [token for own in listed for token in own.tokens]
    values = [value for own in listed for value in own.token_logprobs]
    offsets = [offset for own in listed for offset in own.text_offset]
    assert values == pytest.approx([float(row[token]) for row, token in zip(log_probs, new, strict=True)], abs=1e-4)
    assert offsets == [sum(map(len, tokens[:n])) for n in range(8)]
    assert all(1 <= len(own) <= 2 for part in listed for own in part.top_logprobs)


def test_a_probability_of_zero_and_tokens_of_the_same_text(tokenizer):
    """JSON has no infinity; two halves of characters are the same text, and the more probable one is listed."""
    first, second = tokenizer.encode("é")
    nothing = LogProb(-math.inf, [(first, -0.5), (second, -math.inf)])
    whole = answers.chat_logprobs(tokenizer, [first], [nothing])["content"][0]
    assert (whole["logprob"], whole["top_logprobs"][1]["logprob"]) == (-9999.0, -9999.0)
    assert whole["bytes"] == [0xC3]
    lists = answers.completion_logprobs(tokenizer, [first], [nothing], 7)
    assert lists["token_logprobs"] == [-9999.0]
    assert lists["top_logprobs"] == [{"\ufffd": -0.5}]
    assert lists["text_offset"] == [7]
    json.dumps([whole, lists], allow_nan=False)


def test_stop_and_usage_in_a_stream(client, engine):
    engine.script = "one STOP two"
    options = {"stop": ["STOP"], "max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="tiny", prompt="count", **options))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "one "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens > 0
