"""Chat completions with the real client: each feature whole and streamed, against single runs of the model."""

import openai
import pytest
import torch

from minillm.tokenizer import encode_chat

ASK = [{"role": "user", "content": "Who are you?"}]


def streamed(client, **options):
    """Return the chunks of a streamed chat, and by choice what they add up to."""
    chunks = list(client.chat.completions.create(model="tiny", stream=True, **options))
    joined = {}
    for chunk in chunks:
        for choice in chunk.choices:
            own = joined.setdefault(choice.index, {"content": "", "finish_reason": None, "logprobs": []})
            own["content"] += choice.delta.content or ""
            own["finish_reason"] = choice.finish_reason or own["finish_reason"]
            own["logprobs"] += choice.logprobs.content if choice.logprobs else []
    return chunks, joined


def test_a_greedy_answer_is_that_of_the_model_alone(client, single):
    expected = single("Who are you?", max_new_tokens=40)
    answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, max_tokens=40)
    choice = answer.choices[0]
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length" == expected.finish_reason
    assert (answer.model, answer.object) == ("tiny", "chat.completion")
    assert answer.usage.completion_tokens == 40 == len(expected.ids)
    chunks, joined = streamed(client, messages=ASK, temperature=0, max_completion_tokens=40)
    assert joined[0]["content"] == expected.text
    assert joined[0]["finish_reason"] == "length"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_sampled_answer_follows_its_seed(client, single):
    options = {"temperature": 1.3, "top_p": 0.9}
    extra = {"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.2}
    expected = single("Who are you?", max_new_tokens=30, seed=7, **options, **extra)
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, seed=7, extra_body=extra, **options
    )
    assert answer.choices[0].message.content == expected.text
    _, joined = streamed(client, messages=ASK, max_tokens=30, seed=7, extra_body=extra, **options)
    assert joined[0]["content"] == expected.text
    other = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, seed=8, extra_body=extra, **options
    )
    assert other.choices[0].message.content != expected.text


def test_several_choices_have_seeds_in_a_row(client, single):
    expected = [single("Who are you?", max_new_tokens=20, temperature=1, seed=5 + i).text for i in range(3)]
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20, n=3, seed=5)
    assert [choice.message.content for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 60
    _, joined = streamed(client, messages=ASK, max_tokens=20, n=3, seed=5)
    assert [joined[i]["content"] for i in range(3)] == expected


def test_without_a_seed_answers_differ(client):
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=30, n=2)
    assert answer.choices[0].message.content != answer.choices[1].message.content


def test_stop_strings_are_found_across_tokens_and_left_out(client, engine):
    engine.script = "I am tiny. STOP and more"
    for stop in ("STOP", ["zzz", "ny. S"]):
        expected = "I am tiny. " if stop == "STOP" else "I am ti"
        answer = client.chat.completions.create(model="tiny", messages=ASK, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
        _, joined = streamed(client, messages=ASK, stop=stop)
        assert (joined[0]["content"], joined[0]["finish_reason"]) == (expected, "stop")


def test_characters_of_several_tokens_arrive_whole(client, engine, tokenizer):
    engine.script = text = "naïve 👩‍👩‍👧 你好，世界 🙂!"
    chunks, joined = streamed(client, messages=ASK)
    assert joined[0]["content"] == text
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)
    n_tokens = len(tokenizer.encode("naïve 👩")) - 1  # ends inside the woman
    answer = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=n_tokens)
    assert answer.choices[0].message.content == "naïve "


def test_log_probabilities_are_those_of_the_model(client, model, tokenizer, single):
    ids = encode_chat(tokenizer, ASK, add_generation_prompt=True)[0]
    new = single("Who are you?", max_new_tokens=12).ids
    with torch.inference_mode():
        log_probs = model(torch.tensor([ids + new]))[0].log_softmax(-1)[len(ids) - 1 : -1]  # (12, V)
    options = {"messages": ASK, "temperature": 0, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    listed = client.chat.completions.create(model="tiny", **options).choices[0].logprobs.content
    _, joined = streamed(client, **options)
    assert [entry.model_dump() for entry in joined[0]["logprobs"]] == [entry.model_dump() for entry in listed]
    assert len(listed) == 12
    for entry, token, row in zip(listed, new, log_probs, strict=True):
        assert bytes(entry.bytes) == (tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b"")
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_the_end_token_has_no_log_probability(client, engine):
    engine.script = "I am"
    answer = client.chat.completions.create(model="tiny", messages=ASK, logprobs=True)
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == "I am"
    assert answer.choices[0].finish_reason == "stop"


def test_usage_counts_prompt_answer_and_what_was_cached(client, tokenizer):
    messages = [{"role": "user", "content": "A question that nobody has asked so far, 小明!"}]
    n_prompt = len(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])
    options = {"messages": messages, "temperature": 0, "max_tokens": 8}
    first = client.chat.completions.create(model="tiny", **options).usage
    assert (first.prompt_tokens, first.completion_tokens, first.total_tokens) == (n_prompt, 8, n_prompt + 8)
    chunks, _ = streamed(client, **options, stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert usage.total_tokens == n_prompt + 8
    assert usage.prompt_tokens_details.cached_tokens == (n_prompt - 1) // 4 * 4  # whole pages, never the last token


def test_conversations_reach_the_template_as_they_are(client, tokenizer, single):
    """Several turns, a developer message, content in parts, null content beside calls, a tool's result."""
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be tiny."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
    ]
    turns = [
        {"role": "system", "content": "Be tiny."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    ids = encode_chat(tokenizer, turns, add_generation_prompt=True)[0]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=10)
    assert answer.choices[0].message.content == single(ids, max_new_tokens=10).text
    assert answer.usage.prompt_tokens == len(ids)


def test_an_answer_may_be_as_long_as_the_model_reads(client, single):
    expected = single("Who are you?", max_new_tokens=512)
    answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == len(expected.ids)


def test_models_are_listed(client):
    (card,) = client.models.list()
    assert (card.id, card.object, card.max_model_len) == ("tiny", "model", 512)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/none")
    assert caught.value.code == "model_not_found"


def test_every_request_has_an_id(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=ASK, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().id == "chatcmpl-mine-1"
    others = {client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1)._request_id for _ in range(2)}
    assert len(others) == 2
