"""Tool match: does a model make the expected calls, and does it give the expected answer?

A record has ``tools``, and a conversation that ends with the expected answer. Between the last question and that answer
it may have calls and their results. No function runs: a model that makes the expected calls reads the results of the
record, so that the figures do not depend on the time of day or on a network.

    user       What time is it in Paris?
    assistant  (calls) clock {"place": "Paris"}     compared with the calls of the model's reply
    tool       14:05                                given to a model whose calls were equal
    assistant  It is 14:05 in Paris.                compared with the model's next reply
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.evaluation.exact_match import Answer, ExactMatch, greedy_answers, read_task
from minillm.serving.tools.parse import parse_tool_calls


@dataclass(frozen=True, kw_only=True)
class ToolMatch:
    """The outcome of a task file with tools."""

    calls: ExactMatch
    """Whether all calls were the expected ones, and none if none were expected. Texts are the calls as JSON."""
    answers: ExactMatch
    """Whether the calls and the answer were the expected ones. After other calls the text is the reply with them."""


@dataclass(kw_only=True)
class _Task:
    """One record while the model works on it."""

    messages: list[dict]
    """The conversation so far: what the model replies to."""
    expected: list[dict]
    """The rest of the record: calls, results, answer."""
    tools: list[dict] | None
    labels: dict
    question: str = ""
    given_calls: list = field(default_factory=list)
    expected_calls: list = field(default_factory=list)
    reply: str = ""
    is_done: bool = False

    def take(self, text: str) -> None:
        """Compare a reply with the next expected message; after right calls, go on to the one behind the results."""
        message = self.expected[0]
        self.reply, calls = parse_tool_calls(text, tools=self.tools or [])
        given, wanted = _comparable(calls), _comparable(message.get("tool_calls") or [])
        self.given_calls += given
        if given == wanted and wanted:
            n_turns = next(n for n, turn in enumerate(self.expected) if n and turn["role"] == "assistant")
            self.messages += self.expected[:n_turns]
            del self.expected[:n_turns]
        else:
            self.is_done = True
            self.reply = text if calls else self.reply.strip()

    def outcome(self, expected: str, answer: str, correct: bool) -> Answer:
        """Return one outcome of this record."""
        return Answer(question=self.question, expected=expected, answer=answer, correct=correct, **self.labels)


def tool_match(
    model, tokenizer, records: Iterable[dict | Record], *, max_new_tokens: int = 128, batch_size: int = 64
) -> ToolMatch:
    """Return how many greedy replies make the expected calls, and how many then give the expected answer.

    Calls are equal if names and arguments are; the order of arguments and the spaces in them do not count. Replies to
    the questions before the last one are not measured.

    Args:
        records: as for ``exact_match``, with ``tools`` or without.
        max_new_tokens: longest reply; choose it larger than any expected call.
        batch_size: prompts per batch.

    Raises:
        UserError: no records; one without an expected answer, or with calls that are not followed by one; a prompt that
            does not fit.
    """
    tasks = [_task(number, record) for number, record in enumerate(records)]
    if not tasks:
        raise UserError("no records to measure calls of tools on")
    while running := [task for task in tasks if not task.is_done]:
        texts = greedy_answers(
            model,
            tokenizer,
            [task.messages for task in running],
            tools=[task.tools for task in running],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for task, text in zip(running, texts, strict=True):
            task.take(text)
    calls, answers = [], []
    for task in tasks:
        is_right = task.given_calls == task.expected_calls
        calls.append(task.outcome(_text(task.expected_calls), _text(task.given_calls), is_right))
        expected = task.expected[-1]["content"].strip()
        answers.append(task.outcome(expected, task.reply, is_right and task.reply == expected))
    return ToolMatch(calls=ExactMatch(answers=calls), answers=ExactMatch(answers=answers))


def _task(number: int, record: dict | Record) -> _Task:
    turns, extra, tools = read_task(number, record)
    last_question = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last_question is None:
        raise UserError(f"record {number}: a task with tools needs a question of the user")
    messages, expected = turns[: last_question + 1], turns[last_question + 1 :]
    if expected[0]["role"] != "assistant" or expected[-1].get("tool_calls"):
        raise UserError(f"record {number}: after the question, calls and their results must lead to an answer")
    for turn, next_turn in pairwise(expected):
        if turn["role"] == "assistant" and not (turn.get("tool_calls") and next_turn["role"] == "tool"):
            raise UserError(f"record {number}: after the question, each assistant turn but the last must be calls")
    return _Task(
        messages=list(messages),
        expected=list(expected),
        tools=tools,
        labels={"task": str(extra.get("task", "all")), "group": str(extra.get("group", ""))},
        question=messages[-1].get("content") or "",
        expected_calls=[call for turn in expected for call in _comparable(turn.get("tool_calls") or [])],
    )


def _comparable(calls: list[dict]) -> list[list]:
    """Return [name, arguments] of each call, the arguments as values."""
    functions = [call.get("function") or call for call in calls]
    return [[function["name"], _values(function["arguments"])] for function in functions]


def _values(arguments):
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _text(calls: list[list]) -> str:
    return json.dumps(calls, ensure_ascii=False, sort_keys=True)
