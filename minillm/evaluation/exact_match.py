"""Exact match: does the greedy answer equal the expected one?

A task file holds conversations whose last turn is the assistant's expected answer; ``task`` and ``group``
say where a record counts, e.g. task "facts" with groups "asked" and "derived".
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from minillm.data.schema import Record
from minillm.data.sources.messages import normal_tools
from minillm.errors import UserError
from minillm.inference import complete
from minillm.terminal import progress
from minillm.tokenizer import encode_chats


class Task(NamedTuple):
    """A record to measure."""

    turns: list[dict]
    """The conversation; the last turn is the expected answer."""
    extra: dict
    """The record's other keys."""
    tools: list[dict] | None
    """The functions that the assistant may call."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One record's outcome."""

    task: str
    group: str
    question: str
    """The last turn before the answer."""
    expected: str
    answer: str
    """What the model said, special tokens left out, stripped."""
    correct: bool


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """The score of one line of the table."""

    task: str
    group: str
    n: int
    n_correct: int

    @property
    def accuracy(self) -> float:
        """Return the share of exact answers, 0 to 1."""
        return self.n_correct / self.n


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """The outcome of a whole task file."""

    answers: list[Answer]
    """In the order of the records."""

    @property
    def accuracy(self) -> float:
        """Return the share of exact answers over all records, 0 to 1."""
        return sum(answer.correct for answer in self.answers) / len(self.answers)

    @property
    def groups(self) -> list[GroupScore]:
        """A score per (task, group), sorted by these names."""
        return self._scores(lambda answer: (answer.task, answer.group))

    @property
    def tasks(self) -> list[GroupScore]:
        """A score per task, over all its groups."""
        return self._scores(lambda answer: (answer.task, ""))

    @property
    def task_average(self) -> float:
        """The mean of the tasks' accuracies: each task has the same weight, whatever its number of records."""
        tasks = self.tasks
        return sum(score.accuracy for score in tasks) / len(tasks)

    def as_dict(self, *, answers: bool = True) -> dict:
        """Return the scores, and with ``answers`` every answer, as plain values for JSON."""
        groups = [asdict(score) | {"accuracy": score.accuracy} for score in self.groups]
        values = {"n": len(self.answers), "accuracy": self.accuracy, "task_average": self.task_average}
        values |= {"tasks": {score.task: score.accuracy for score in self.tasks}, "groups": groups}
        return values | ({"answers": [asdict(answer) for answer in self.answers]} if answers else {})

    def table(self) -> str:
        """Return a table as text: a line per task and group, then the averages."""
        width = max(20, *(len(score.group) for score in self.groups))
        n_correct = sum(answer.correct for answer in self.answers)
        total = GroupScore(task="all", group="", n=len(self.answers), n_correct=n_correct)
        lines = [f"{'task':<20} {'group':<{width}} {'exact':>7} {'of':>7} {'share':>8}"]
        for score in [*self.groups, total]:
            counts = f"{score.n_correct:>7,} {score.n:>7,} {score.accuracy:>8.1%}"
            lines.append(f"{score.task:<20} {score.group:<{width}} {counts}")
        lines.append(f"{'mean of tasks':<20} {'':<{width}} {'':>7} {'':>7} {self.task_average:>8.1%}")
        return "\n".join(lines)

    def _scores(self, key) -> list[GroupScore]:
        grouped: dict[tuple[str, str], list[bool]] = {}
        for answer in self.answers:
            grouped.setdefault(key(answer), []).append(answer.correct)
        return [
            GroupScore(task=task, group=group, n=len(correct), n_correct=sum(correct))
            for (task, group), correct in sorted(grouped.items())
        ]


def exact_match(
    model, tokenizer, records: Iterable[dict | Record], *, max_new_tokens: int = 64, batch_size: int = 64
) -> ExactMatch:
    """Return how many greedy answers equal the expected last turn, both without white space around them.

    Args:
        records: ``{"conversations": [...], "tools"?, "task"?, "group"?}`` (or "messages") as dicts or from
            ``read_records``; messages with ``role`` and ``content``, of which the last is the assistant's.
        max_new_tokens: longest answer; choose it larger than any expected answer.
        batch_size: prompts per batch. Prompts of similar length share a batch, and finished rows leave it.

    Raises:
        UserError: no records; a record whose last turn is not an assistant's; a prompt that does not fit.
    """
    tasks = [read_task(number, record) for number, record in enumerate(records)]
    if not tasks:
        raise UserError("no records to measure exact match on")
    limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    questions, tools = [task.turns[:-1] for task in tasks], [task.tools for task in tasks]
    texts = greedy_answers(model, tokenizer, questions, tools=tools, **limits)
    answers = []
    for task, text in zip(tasks, texts, strict=True):
        expected = task.turns[-1]["content"].strip()
        answers.append(
            Answer(
                task=str(task.extra.get("task", "all")),
                group=str(task.extra.get("group", "")),
                question=task.turns[-2].get("content") or "",
                expected=expected,
                answer=text,
                correct=text == expected,
            )
        )
    return ExactMatch(answers=answers)


def greedy_answers(
    model,
    tokenizer,
    conversations: list[list[dict]],
    *,
    tools: list[list[dict] | None] | None = None,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Return the greedy answer to each conversation, without special tokens, stripped; see ``exact_match``."""
    prompts = [ids for ids, _ in encode_chats(tokenizer, conversations, tools=tools, add_generation_prompt=True)]
    return greedy_texts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)


def greedy_texts(
    model,
    tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: tuple[str, ...] = (),
    bar: bool = True,
) -> list[str]:
    """Return the greedy text after each prompt (token ids), without special tokens, stripped.

    Args:
        stop: strings that end a text, as an end token does.
        bar: whether this process shows the progress.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    texts: dict[int, str] = {}
    for first in progress(range(0, len(order), batch_size), desc="answering", unit="batch", enabled=bar):
        batch = order[first : first + batch_size]
        completions = complete(
            model,
            [prompts[number] for number in batch],
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            eos_token_id=tokenizer.end_ids,
            stop=stop,
            tokenizer=tokenizer,
        )
        texts |= {number: completion.text.strip() for number, completion in zip(batch, completions, strict=True)}
    return [texts[number] for number in range(len(prompts))]


def read_task(number: int, record: dict | Record) -> Task:
    """Return the task of a record; UserError unless it has a question and an expected answer, a text."""
    if isinstance(record, Record):
        turns, extra, tools = record.messages, record.extra, record.tools
    else:
        turns, extra, tools = record.get("conversations") or record.get("messages"), record, normal_tools(record)
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"record {number}: a task needs 'conversations': at least a question and its answer")
    if turns[-1].get("role") != "assistant" or not isinstance(turns[-1].get("content"), str):
        raise UserError(
            f"record {number}: the last turn must be the assistant's expected answer, a text; "
            f"its role is {turns[-1].get('role')!r}"
        )
    if turns[-1].get("tool_calls"):
        raise UserError(
            f"record {number}: the expected answer has tool_calls, and answers are compared as texts: write the calls "
            "into its content, as the chat template writes them"
        )
    return Task(turns, extra, tools)
