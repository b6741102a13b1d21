"""An answer arrives by itself, calls tools, can be stopped, and stops when nobody looks."""

import time

import pytest

from minillm.serving.tools import Toolbox
from minillm.web.answer import MAX_ROUNDS, Answer, add_chunk
from minillm.web.client import Client


def calculator(expression: str) -> str:
    """Calculate.

    Args:
        expression: to calculate.
    """
    return f"{expression}=42"


def ask(server, question: str, *, fields: dict | None = None, tools=(), **options) -> Answer:
    request = {"model": "tiny", "messages": [{"role": "user", "content": question}]} | (fields or {})
    return Answer(Client(server.url), request, toolbox=Toolbox(tools), **options)


def until(condition, *, within_s: float = 5) -> bool:
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_text_thoughts_tokens_and_speed(server):
    answer = ask(server, "think hard", fields={"logprobs": True})
    answer.wait(10)
    (message,) = answer.look()
    info = message.pop("info")
    text = "You said: think hard (1 messages, tiny) "
    assert message == {"role": "assistant", "content": text, "reasoning_content": "Let me see."}
    assert "".join(token["token"] for token in info["tokens"]) == text
    assert (info["model"], info["finish_reason"], info["n_tokens"]) == ("tiny", "stop", 12)
    assert 0 < info["first_s"] <= info["seconds"] < 10
    assert not answer.error


def test_tools_are_called_until_the_model_answers(server):
    answer = ask(server, "tool", tools=[calculator])
    answer.wait(10)
    calling, result, final = answer.look()
    function = {"name": "calculator", "arguments": '{"expression": "6*7"}'}
    assert calling["tool_calls"] == [{"id": "call_a", "type": "function", "function": function}]
    assert result == {"role": "tool", "tool_call_id": "call_a", "name": "calculator", "content": "6*7=42"}
    assert final["content"] == "The tool says 6*7=42. "
    assert server.requests[0]["tools"] == Toolbox([calculator]).schemas
    second = server.requests[1]["messages"]
    assert [message["role"] for message in second] == ["user", "assistant", "tool"]
    assert all("info" not in message for message in second)


def test_a_model_that_only_calls_tools_comes_to_an_end(server):
    answer = ask(server, "loop", tools=[calculator])
    answer.wait(10)
    assert len(server.requests) == MAX_ROUNDS + 1
    assert "without an answer" in answer.error
    assert answer.look()[-1]["role"] == "tool"


def test_stop_keeps_what_came_and_tells_the_server(server):
    answer = ask(server, "slow")
    assert until(lambda: answer.look() and "word1" in answer.look()[0]["content"])
    assert answer.is_running
    answer.stop()
    answer.wait(2)
    assert not answer.is_running
    (message,) = answer.look()
    assert message["content"].startswith("word0 word1 ")
    assert message["info"]["finish_reason"] == "stopped"
    assert not answer.error
    assert until(lambda: server.n_vanished == 1)


def test_stop_before_the_first_word(server):
    answer = ask(server, "silent")
    answer.stop()
    answer.wait(2)
    assert not answer.is_running
    assert answer.look()[0]["content"] == ""


def test_an_answer_that_nobody_looks_at_is_stopped(server):
    watched, left = ask(server, "slow", patience_s=0.3), ask(server, "slow", patience_s=0.3)
    assert until(lambda: watched.look() and not left.is_running)
    assert watched.is_running
    watched.stop()
    assert until(lambda: server.n_vanished == 2)


def test_errors_are_kept_with_what_came_before(server):
    for question, text, error in (
        ("error", "so far", "the model ran out of memory"),
        ("refuse", "", "9 tokens too many"),
        ("odd", "", "of an unknown form"),
        ("break", "half an ans", "early|broke off"),
    ):
        answer = ask(server, question)
        answer.wait(10)
        (message,) = answer.look()
        assert message["content"] == text
        assert any(part in answer.error for part in error.split("|")), answer.error
        assert message["info"]["error"] == answer.error


def test_calls_come_in_parts_and_several_at_once():
    message: dict = {"role": "assistant"}
    for index, function_id, name, arguments in (
        (0, "a", "clock", '{"zo'), (1, "b", "units", ""), (0, None, None, 'ne": 1}'), (1, None, None, "{}"),
    ):  # fmt: skip
        part = {"index": index, "id": function_id, "function": {"name": name, "arguments": arguments}}
        add_chunk(message, {"choices": [{"delta": {"tool_calls": [part]}}]})
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "clock", "arguments": '{"zone": 1}'},
        {"name": "units", "arguments": "{}"},
    ]
    assert [call["id"] for call in message["tool_calls"]] == ["a", "b"]
    for index in (-1, 10**9):  # would fill the memory
        with pytest.raises(IndexError):
            add_chunk(message, {"choices": [{"delta": {"tool_calls": [{"index": index}]}}]})
