"""Chats go out and come back the same; whatever is no chat is refused; the prompt has what it must have."""

import json

import pytest

from minillm.errors import UserError
from minillm.web.chats import Chat, from_json, to_json

CALL = {"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
INFO = {"model": "tiny", "n_tokens": 3, "seconds": 0.5, "finish_reason": "stop"}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str | None, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def chat() -> Chat:
    messages = [
        user("What time\nis it?"),
        said("", tool_calls=[CALL], reasoning_content="look"),
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
        said("Noon.", info=INFO | {"tokens": [{"token": "N", "logprob": -1.0}]}),
        user("Stopped"),
        said("", info={"finish_reason": "stopped"}),
        user("你好"),
        said("Hi", reasoning_content="greet"),
        user("And now?"),
    ]
    return Chat(messages, "Be brief.")


def test_out_and_back():
    (back,) = from_json(to_json([chat(), Chat()]))
    expected = chat()
    expected.messages[3] = said("Noon.", info=INFO)  # without the probabilities
    assert (back.messages, back.system) == (expected.messages, expected.system)
    assert "你好" in to_json([chat()])


def test_one_conversation_in_openai_form():
    text = json.dumps({"messages": [{"role": "system", "content": "S"}, user("a"), said("b")]})
    (back,) = from_json(text.encode())
    assert (back.messages, back.system) == ([user("a"), said("b")], "S")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "must hold"),
        ({"chats": {}}, "must hold"),
        ({"format": "other 2", "chats": []}, "its format is 'other 2'"),
        ({"chats": [1]}, "chat 1: has no list"),
        ({"chats": [{"messages": [{"role": "boss", "content": "x"}]}]}, "chat 1, message 1: must have a role"),
        ({"chats": [{"messages": [user("")]}]}, "an empty question"),
        ({"chats": [{"messages": [user(None)]}]}, "an empty question"),
        ({"chats": [{"messages": [user(["part"])]}]}, "its content is no text"),
        ({"chats": [{"messages": [said("x")]}]}, "must begin with a question"),
        ({"messages": [user("a"), {"role": "system", "content": "late"}]}, "behind its beginning"),
        ({"messages": [user("a"), said("b", tool_calls=[{"function": {"name": "f", "arguments": {}}}])]}, "tool_calls"),
        ({"messages": [user("a"), said("b", tool_calls=[7])]}, "tool_calls"),
        ({"messages": [user("a"), said("b", reasoning_content=7)]}, "reasoning_content is no text"),
        ({"messages": [user("a"), said("b", info=[])]}, "its info"),
        ({"messages": [user("a"), {"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [user("a")], "system": 7}, "system message is no text"),
    ],
)
def test_what_is_no_chat(content, message):
    with pytest.raises(UserError, match=message):
        from_json(content if isinstance(content, str) else json.dumps(content))


def test_unknown_info_is_left_out():
    text = json.dumps({"messages": [user("a"), said("b", info={"n_tokens": "many", "model": "m", "tokens": "x"})]})
    assert from_json(text)[0].messages[1] == said("b", info={"model": "m"})


def test_the_prompt():
    """The thoughts and infos stay here; turns without an answer do too; the question is the last message."""
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "12:00", "tool_call_id": "a"}
    noon = [user("What time\nis it?"), call, result, said("Noon.")]
    greeting = [user("你好"), said("Hi")]
    system, question = {"role": "system", "content": "Be brief."}, user("And now?")
    assert chat().prompt(n_earlier=9) == [system, *noon, *greeting, question]
    assert chat().prompt(n_earlier=1) == [system, *greeting, question]
    assert chat().prompt(n_earlier=0) == [system, question]
    assert Chat([user("a")], "  ").prompt(n_earlier=3) == [user("a")]


def test_a_question_replaces_what_follows():
    edited = chat()
    edited.ask("Hello", turn=2)
    assert edited.messages == [*chat().messages[:6], user("Hello")]
    edited.ask("More")
    edited.messages.append(said("answer"))
    edited.drop_answer()
    assert edited.messages == [*chat().messages[:6], user("Hello"), user("More")]
    edited.ask("First", turn=0)
    assert edited.messages == [user("First")]


def test_titles():
    assert chat().title == "What time is it?"
    assert Chat().title == ""
    assert len(Chat([user("字" * 100)]).title) == 40
