"""Thinking and calls of tools: split off, streamed or whole; and JSON by constrained decoding."""

import itertools
import json

import pytest
from pydantic import BaseModel

from minillm.serving.api.parsing import AnswerParser, join_deltas

ASK = [{"role": "user", "content": "Who are you?"}]
NUMBER = {"type": "integer", "minimum": -9, "maximum": 99}  # a random model would write digits for ever
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def parse(pieces, *, opened="", tools=None):
    parser = AnswerParser(opened=opened, tools=tools)
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    return join_deltas(deltas + parser.finish())


def both_ways(client, **options):
    """Return message and finish_reason of a chat, which must be the same streamed."""
    whole = client.chat.completions.create(model="tiny", messages=ASK, **options).choices[0]
    message = whole.message.model_dump(exclude_none=True)
    deltas, finish_reason = [], None
    for chunk in client.chat.completions.create(model="tiny", messages=ASK, stream=True, **options):
        delta = chunk.choices[0].delta.model_dump(exclude_none=True)
        delta.pop("role", None)
        deltas.append({name: value for name, value in delta.items() if value != ""})
        finish_reason = chunk.choices[0].finish_reason or finish_reason
    streamed = join_deltas(deltas)
    for call in [*message.get("tool_calls", ()), *streamed.get("tool_calls", ())]:
        assert call.pop("id")
    assert finish_reason == whole.finish_reason
    assert {k: v for k, v in streamed.items() if v is not None} == message
    return message, finish_reason


# ---- thinking ----------------------------------------------------------------------------------------------------


def test_thinking_is_split_off(client, engine):
    engine.script = "<think>\n1 < 2\n</think>\n<answer>\nyes </b>\n</answer>\n"
    message, finish_reason = both_ways(client)
    assert message == {"role": "assistant", "reasoning_content": "1 < 2", "content": "yes </b>"}
    assert finish_reason == "stop"


@pytest.mark.parametrize(
    ("text", "thinking", "content"),
    [
        ("  8\n", None, "  8\n"), ("<think>1 + ", "1 + ", ""), ("a <b", None, "a <b"),
        ("So <think>1</think> 2", "1", "So\n2"), ("<think>\n\n</think>\n\n8", None, "8"), ("", None, ""),
        ("\n<think>x</think>\n", "x", ""), ("<answer>8</answer>\n", None, "8"),
    ],
)  # fmt: skip
def test_nothing_else_is_lost_however_the_text_is_cut(text, thinking, content):
    expected = {"role": "assistant", "content": content}
    for pieces in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        message = parse(pieces)
        assert message.pop("reasoning_content", None) == thinking
        assert {**message, "content": message["content"] or ""} == expected


def test_thinking_that_the_prompt_has_opened():
    assert parse(["so", "</think>8"], opened="<think>\n") == {
        "role": "assistant", "content": "8", "reasoning_content": "so"
    }  # fmt: skip
    assert parse(["8"], opened="<think>\n\n</think>\n\n") == {"role": "assistant", "content": "8"}
    assert parse(["<think>8"], opened=None) == {"role": "assistant", "content": "<think>8"}


# ---- calls of tools ----------------------------------------------------------------------------------------------


def test_calls_are_found(client, engine):
    engine.script = f"<think>\nadd\n</think>\nLet me see.\n{CALL}\n{CALL}"
    message, finish_reason = both_ways(client, tools=[ADD])
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    assert message["tool_calls"] == [call, call]
    assert (message["reasoning_content"], message["content"].strip()) == ("add", "Let me see.")
    assert finish_reason == "tool_calls"


def test_without_tools_a_call_is_text(client, engine):
    engine.script = CALL
    for options in ({}, {"tools": [ADD], "tool_choice": "none"}):
        message, finish_reason = both_ways(client, **options)
        assert (message["content"], finish_reason) == (CALL, "stop")


def test_tools_reach_the_prompt(client):
    with_tools, without = (
        client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1, tools=[ADD], tool_choice=choice).usage
        for choice in ("auto", "none")
    )
    assert with_tools.prompt_tokens > without.prompt_tokens + 20


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_call_can_be_forced(client, temperature):
    options = {"tools": [ADD, CLOCK], "temperature": temperature, "seed": 1, "max_tokens": 200}
    named = {"type": "function", "function": {"name": "clock"}}
    message, finish_reason = both_ways(client, **options, tool_choice=named)
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]
    json.loads(message["tool_calls"][0]["function"]["arguments"])
    assert finish_reason == "tool_calls"
    adds = {"tools": [ADD]}
    message, _ = both_ways(client, **{**options, **adds}, tool_choice="required")
    arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
    assert set(arguments) == {"a", "b"}
    assert all(isinstance(value, int) for value in arguments.values())


# ---- JSON --------------------------------------------------------------------------------------------------------


class Person(BaseModel):
    """Something to fill in."""

    name: str
    age: int
    tags: list[bool]


def limited(schema):
    """Return a schema whose strings and lists are short: a random model would go on for ever."""
    for part in [schema, *schema.get("properties", {}).values()]:
        if part.get("type") == "string":
            part["maxLength"] = 12
        if part.get("type") == "array":
            part["maxItems"] = 3
        if part.get("type") == "integer":
            part |= {"minimum": -10, "maximum": 2000}
    return schema | {"additionalProperties": False}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_of_a_schema(client, temperature):
    schema = limited(Person.model_json_schema())
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for seed in range(2):
        message, finish_reason = both_ways(client, response_format=wanted, temperature=temperature, seed=seed)
        Person.model_validate_json(message["content"])
        assert finish_reason == "stop"


def test_each_choice_has_its_own_place_in_the_grammar(client):
    schema = limited(Person.model_json_schema())
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=ASK, response_format=wanted, n=5, seed=9)
    people = [Person.model_validate_json(choice.message.content) for choice in answer.choices]
    assert len({person.name for person in people}) > 1


def test_any_json_object(client):
    texts = [
        client.chat.completions.create(
            model="tiny", messages=ASK, response_format={"type": "json_object"}, seed=seed, max_tokens=60
        ).choices[0]
        for seed in range(4)
    ]
    for choice in texts:
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


def test_the_client_parses_its_own_classes(client):
    class Small(BaseModel):
        yes: bool

    answer = client.chat.completions.parse(model="tiny", messages=ASK, response_format=Small)
    assert isinstance(answer.choices[0].message.parsed, Small)


def test_cuts_of_a_whole_answer():
    """Thinking, content and a call in one text, at every pair of cuts."""
    text = f"<think>\na\n</think>\nb {CALL}"
    expected = parse([text], tools=[ADD])
    expected["tool_calls"][0].pop("id")
    for first, second in itertools.combinations(range(1, len(text), 3), 2):
        message = parse([text[:first], text[first:second], text[second:]], tools=[ADD])
        message["tool_calls"][0].pop("id")
        assert message == expected
