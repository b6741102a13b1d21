"""Conversations and texts of any content: ids that say exactly what was written, and a mask of exactly the answers."""

import json
import re

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.tokenizer import TAG_TOKENS, check_messages, encode_chat, load_tokenizer, train_sentencepiece
from minillm.tokenizer.base import CONTROL_TOKENS, FILES

from .conftest import SENTENCES
from .strategies import (
    TIMEOUT_S,
    as_json,
    broken_texts,
    conversations,
    damaged,
    examples,
    mutated,
    outcome,
    scratch,
    texts,
    values,
)  # fmt: skip

pytestmark = pytest.mark.timeout(TIMEOUT_S)
TOKENS = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, *TAG_TOKENS))))


@pytest.fixture(scope="session", params=["bpe", "sentencepiece"])
def encoder(request, tokenizer):
    """Our two kinds of tokenizer."""
    if request.param == "bpe":
        return tokenizer
    pytest.importorskip("sentencepiece")
    return train_sentencepiece((SENTENCES[n % 2][n % 11 :] for n in range(100)), vocab_size=400)


def written(message: dict) -> str:
    """Return what stands between the header of a message and its end, as the chat template writes it."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    if message["role"] != "assistant":
        return content
    thinking = message.get("reasoning_content")
    text = (f"<think>\n{thinking}\n</think>\n" if thinking else "") + content
    for n, call in enumerate(message.get("tool_calls") or ()):
        call = call.get("function") or call
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(call["name"], ensure_ascii=False)
        text += (
            "\n" if content or n else ""
        ) + f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
    return text


def rendered(messages: list[dict]) -> str:
    return "".join(f"<|im_start|>{message['role']}\n{written(message)}<|im_end|>\n" for message in messages)


def marked(ids: list[int], mask: list[int]) -> list[list[int]]:
    """Return the stretches of ids whose mask is 1."""
    runs = [[]]
    for token, is_target in zip(ids, mask, strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@examples(120)
@given(conversations)
def test_ids_say_what_was_written_and_the_mask_marks_the_answers(encoder, messages):
    ids, mask = encode_chat(encoder, messages)
    assert len(ids) == len(mask)
    assert encoder.decode(ids) == rendered(messages)
    answers = [written(message) + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert [encoder.decode(run) for run in marked(ids, mask)] == answers
    _, last = encode_chat(encoder, messages, train_on="last")
    assert [encoder.decode(run) for run in marked(ids, last)] == answers[-1:]


@examples(120)
@given(conversations)
def test_control_tokens_come_from_the_format_alone(encoder, messages):
    start, end, eos = encoder.im_start_id, encoder.im_end_id, encoder.eos_token_id
    ids, _ = encode_chat(encoder, messages)
    assert (ids.count(start), ids.count(end), ids.count(eos)) == (len(messages), len(messages), 0)
    tags = {encoder.token_id(tag) for tag in TAG_TOKENS}
    begins = [place for place, token in enumerate(ids) if token == start]
    for message, begin, stop in zip(messages, begins, [*begins[1:], len(ids)], strict=True):
        found = [token for token in ids[begin:stop] if token in tags]
        if message["role"] in ("system", "user"):
            assert found == []
        elif message["role"] == "tool":
            assert [encoder.decode([token]) for token in found] == ["<tool_response>", "</tool_response>"]


@examples(120)
@given(conversations)
def test_parts_make_the_whole(encoder, messages):
    header = encode_chat(encoder, [{"role": "user", "content": ""}], add_generation_prompt=True)[0]
    header = header[len(header) - 1 - header[::-1].index(encoder.im_start_id) :]
    whole, parts = encode_chat(encoder, messages, add_generation_prompt=True)[0], []
    for message in messages:
        ids, _ = encode_chat(encoder, [message], add_generation_prompt=True)
        assert ids[-len(header) :] == header
        parts += ids[: -len(header)]
    assert parts + header == whole


@examples(120)
@given(conversations)
def test_a_reader_of_the_whole_text_sees_the_same_ids(encoder, messages):
    """As transformers does it: the text is rendered first, and encoded at once. It parses tokens in content too."""
    reader = tokenizers.Tokenizer.from_str(encoder.files["tokenizer.json"])
    for message in messages:
        for key in ("content", "reasoning_content"):
            message[key] = TOKENS.sub("", message.get(key) or "").replace("<|", "")
        message.pop("tool_calls", None)
        if message["role"] != "assistant":
            del message["reasoning_content"]
    assert reader.encode(rendered(messages), add_special_tokens=False).ids == encode_chat(encoder, messages)[0]


@examples(250)
@given(mutated(conversations) | values)
def test_messages_of_any_form_are_encoded_or_refused(tokenizer, messages):
    refused = outcome(check_messages, messages)
    encoded = outcome(encode_chat, tokenizer, messages)
    if refused is not None:
        assert str(encoded) == str(refused)
    elif not isinstance(encoded, UserError):  # a lone surrogate is seen by the tokenizer alone
        ids, mask = encoded
        assert len(ids) == len(mask) > 0
        assert tokenizer.decode(ids) == rendered(messages)


# ---- plain texts -----------------------------------------------------------------------------------------------


@examples(150)
@given(st.lists(texts, max_size=4))
def test_texts_come_back_exactly(encoder, several):
    encoded = [encoder.encode(text) for text in several]
    assert encoder.encode_batch(several) == encoded
    assert [encoder.decode(ids) for ids in encoded] == several
    assert not {token for ids in encoded for token in ids} & set(map(encoder.token_id, (*CONTROL_TOKENS, *TAG_TOKENS)))
    assert encoder.encode("\n".join(several)) == [
        token for n, ids in enumerate(encoded) for token in (encoder.encode("\n") if n else []) + ids
    ]


@examples(60)
@given(broken_texts)
def test_a_lone_surrogate_is_named(encoder, text):
    for error in (outcome(encoder.encode, text), outcome(encoder.encode_batch, ["a", text])):
        assert isinstance(error, UserError)
        assert "lone surrogate U+D" in str(error)


@examples(100)
@given(st.data())
def test_any_ids_are_decoded(encoder, data):
    ids = data.draw(st.lists(st.integers(0, encoder.vocab_size - 1)))
    joined = b"".join(map(encoder.token_bytes, ids))
    assert encoder.decode(ids) == joined.decode("utf-8", errors="replace")
    assert isinstance(encoder.decode(ids, skip_special_tokens=True), str)


# ---- tokenizers on disk ------------------------------------------------------------------------------------------


@examples(150)
@given(st.data())
def test_a_damaged_tokenizer_is_refused_or_works(tokenizer, data):
    name = data.draw(st.sampled_from([name for name in FILES if name in tokenizer.files]))
    content = tokenizer.files[name].encode()
    how = damaged(content)
    if name.endswith(".json"):
        how |= mutated(st.just(json.loads(content))).map(as_json)
    with scratch() as folder:
        tokenizer.save(folder)
        (folder / name).write_bytes(data.draw(how))
        loaded = outcome(load_tokenizer, folder)
        if isinstance(loaded, UserError):
            assert str(folder) in str(loaded)
            return
        for call in (
            lambda: (loaded.vocab_size, loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id, loaded.end_ids),
            lambda: loaded.decode(loaded.encode("a fox 小明\n")),
            lambda: encode_chat(loaded, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
            lambda: loaded.content_hash,
        ):
            outcome(call)
