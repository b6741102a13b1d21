"""The loop from a question to an answer, with replies that are known."""

import json

import pytest

from minillm.errors import UserError
from minillm.serving.tools import Toolbox, describe_message, tool_loop


def multiply(a: int, b: int) -> int:
    """Multiply."""
    return a * b


def broken() -> str:
    """Fail."""
    raise ValueError("no luck")


def written(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Scripted:
    """Gives the replies in turn and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies, self.asked = list(replies), []

    def __call__(self, messages, tools):
        self.asked.append(([dict(message) for message in messages], tools))
        return self.replies.pop(0)


QUESTION = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 23*45, and 2*2?"}]


def test_calls_results_and_answer():
    replies = Scripted(f"I compute.\n{written('multiply', a=23, b=45)}\n{written('multiply', a=2, b=2)}", "1035 and 4.")
    messages = list(tool_loop(replies, QUESTION, [multiply]))
    first, second = messages[0]["tool_calls"]
    assert json.loads(first["function"]["arguments"]) == {"a": 23, "b": 45}
    assert messages == [
        {"role": "assistant", "content": "I compute.", "tool_calls": [first, second]},
        {"role": "tool", "tool_call_id": first["id"], "name": "multiply", "content": "1035"},
        {"role": "tool", "tool_call_id": second["id"], "name": "multiply", "content": "4"},
        {"role": "assistant", "content": "1035 and 4."},
    ]
    assert first["id"] != second["id"]
    assert [asked for asked, _ in replies.asked] == [QUESTION, QUESTION + messages[:3]]
    assert all(tools == Toolbox([multiply]).schemas for _, tools in replies.asked)
    assert len(QUESTION) == 2  # the caller's list is its own
    shown = [describe_message(message) for message in messages]
    assert shown == [
        'I compute.\n[multiply {"a": 23, "b": 45}]\n[multiply {"a": 2, "b": 2}]',
        "[multiply: 1035]",
        "[multiply: 4]",
        "1035 and 4.",
    ]


def test_each_message_comes_as_soon_as_it_is_complete():
    replies = Scripted(written("multiply", a=2, b=3))  # Ctrl-C, or an error, before the second reply
    received = []
    with pytest.raises(IndexError):
        received.extend(tool_loop(replies, QUESTION, [multiply]))
    assert [message["role"] for message in received] == ["assistant", "tool"]


def test_an_answer_without_calls_is_one_message():
    text = "\n<tool_call>broken</tool_call> "
    assert list(tool_loop(Scripted(text), QUESTION, [multiply])) == [{"role": "assistant", "content": text}]


def test_errors_go_to_the_model_and_the_loop_goes_on():
    replies = Scripted(written("broken"), written("nowhere"), written("multiply", a="x", b=1), "Sorry.")
    messages = list(tool_loop(replies, QUESTION, [multiply, broken]))
    assert [message["content"] for message in messages if message["role"] == "tool"] == [
        "error: ValueError: no luck",
        "error: there is no function 'nowhere'; there are multiply, broken",
        "error: arguments.a is 'x'; it must be of type integer",
    ]
    assert messages[-1] == {"role": "assistant", "content": "Sorry."}


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_model_that_only_calls_is_stopped_and_every_call_has_a_result(max_rounds):
    n_runs = []

    def count() -> str:
        """Count."""
        n_runs.append(1)
        return str(len(n_runs))

    messages = list(tool_loop(lambda *_: written("count") * 2, QUESTION, [count], max_rounds=max_rounds))
    assert len(n_runs) == 2 * max_rounds
    assert [message["role"] for message in messages] == ["assistant", "tool", "tool"] * (max_rounds + 1)
    assert messages[-1]["content"] == f"error: not run, after {max_rounds} rounds of calls"
    ids = [call["id"] for message in messages for call in message.get("tool_calls", ())]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ids


def test_no_rounds_are_refused_and_errors_of_the_model_pass():
    with pytest.raises(UserError, match="max_rounds 0: must be at least 1"):
        tool_loop(Scripted("a"), QUESTION, [multiply], max_rounds=0)

    def fail(messages, tools):
        raise UserError("the prompt is too long")

    with pytest.raises(UserError, match="the prompt is too long"):
        next(tool_loop(fail, QUESTION, [multiply]))
