"""Measures answers with reasoning, ``<think>…</think><answer>…</answer>``: correctness, form, gain by more samples.

A record's last turn is the expected answer, with or without reasoning; if the record has ``final``, that is compared
instead. With thinking, the model writes both blocks. Without thinking, its turn is started with an empty think block.
The difference between the two is the gain by thinking.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from minillm.data.reasoning import DIRECT, find_answer, parse_reasoning, same_answer
from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.evaluation.exact_match import Task, read_task
from minillm.inference import Completion, SamplingOptions, complete
from minillm.terminal import progress
from minillm.tokenizer import encode_chats, encode_started
from minillm.tokenizer.chat_format import chat_format


class ReadAnswer(NamedTuple):
    """The parts of an answer, which may or may not have the form."""

    answer: str
    thinking: str
    """Up to the end of the text if the block was never closed; empty without a block."""
    well_formed: bool


@dataclass(frozen=True, kw_only=True)
class ReasonedAnswer:
    """The result of one record: lists over its samples, in the order of sampling."""

    task: str
    group: str
    question: str
    """The last turn before the answer."""
    expected: str
    texts: list[str]
    """The complete turns, without special tokens."""
    answers: list[str]
    correct: list[bool]
    well_formed: list[bool]
    n_tokens: list[int]
    """New tokens, including the end of the turn."""

    @property
    def majority_correct(self) -> bool:
        """Whether the most frequent well-formed answer is right; False without a well-formed answer."""
        votes = [answer for answer, formed in zip(self.answers, self.well_formed, strict=True) if formed]
        winner = majority(votes)
        return winner is not None and same_answer(winner, self.expected)


@dataclass(frozen=True, kw_only=True)
class ReasoningScore:
    """The outcome of a whole file, or of one group of it."""

    answers: list[ReasonedAnswer]
    """In the order of the records."""

    @property
    def n_samples(self) -> int:
        """Return the number of answers per record."""
        return len(self.answers[0].texts)

    @property
    def accuracy(self) -> float:
        """The share of right answers over all samples, 0 to 1; with one sample per record this is exact match."""
        return self._mean("correct")

    @property
    def format_adherence(self) -> float:
        """Return the share of answers that have the form, 0 to 1."""
        return self._mean("well_formed")

    @property
    def mean_tokens(self) -> float:
        """Return the mean length of an answer in tokens."""
        return self._mean("n_tokens")

    @property
    def majority_accuracy(self) -> float:
        """Return the share of records whose most frequent answer is right (Wang et al., Self-consistency, 2022)."""
        return sum(answer.majority_correct for answer in self.answers) / len(self.answers)

    @property
    def pass_at(self) -> dict[int, float]:
        """Return the chance that at least one of k answers is right, for k = 1, 2, 4, ... and n_samples."""
        n = self.n_samples
        ks = sorted({2**power for power in range(n.bit_length())} | {n})
        return {k: sum(pass_at_k(n, sum(a.correct), k) for a in self.answers) / len(self.answers) for k in ks}

    @property
    def groups(self) -> dict[tuple[str, str], "ReasoningScore"]:
        """Return the score of each (task, group), sorted by these names."""
        grouped: dict[tuple[str, str], list[ReasonedAnswer]] = {}
        for answer in self.answers:
            grouped.setdefault((answer.task, answer.group), []).append(answer)
        return {key: ReasoningScore(answers=answers) for key, answers in sorted(grouped.items())}

    def as_dict(self, *, answers: bool = True) -> dict:
        """Return the figures, those of the groups, and with ``answers`` every answer, as plain values for JSON."""
        values = {"n": len(self.answers), "n_samples": self.n_samples} | self._figures()
        groups = [
            {"task": task, "group": group, "n": len(score.answers)} | score._figures()
            for (task, group), score in self.groups.items()
        ]
        return values | {"groups": groups} | ({"answers": list(map(asdict, self.answers))} if answers else {})

    def table(self) -> str:
        """Return a table as text: a line per task and group, then one for all."""
        width = max(20, *(len(group) for _, group in self.groups))
        ks = list(self.pass_at) if self.n_samples > 1 else []
        names = ["exact", "format", *(["majority"] if ks else []), *(f"pass@{k}" for k in ks)]
        head = f"{'task':<20} {'group':<{width}} {'of':>7} {'tokens':>8}"
        lines = [head + "".join(f" {name:>8}" for name in names)]
        for (task, group), score in [*self.groups.items(), (("all", ""), self)]:
            shares = [score.accuracy, score.format_adherence]
            shares += [score.majority_accuracy, *score.pass_at.values()] if ks else []
            line = f"{task:<20} {group:<{width}} {len(score.answers):>7,} {score.mean_tokens:>8.1f}"
            lines.append(line + "".join(f" {share:>8.1%}" for share in shares))
        return "\n".join(lines)

    def _mean(self, name: str) -> float:
        return sum(sum(getattr(answer, name)) for answer in self.answers) / (len(self.answers) * self.n_samples)

    def _figures(self) -> dict:
        figures = {name: getattr(self, name) for name in ("accuracy", "format_adherence", "mean_tokens")}
        if self.n_samples == 1:
            return figures
        return figures | {
            "majority_accuracy": self.majority_accuracy,
            "pass_at": {str(k): share for k, share in self.pass_at.items()},
        }


def evaluate_reasoning(
    model,
    tokenizer,
    records: Iterable[dict | Record],
    *,
    max_new_tokens: int,
    batch_size: int,
    n_samples: int = 1,
    temperature: float = 0.0,
    generator=None,
    think: bool = True,
    report: Callable[[int, int], None] = lambda n_done, n: None,
    **sampling,
) -> ReasoningScore:
    """Return how many answers are right and have the form, with or without thinking.

    Args:
        records: as for ``exact_match``; with ``final`` if the last turn is more than the answer.
        batch_size: answers per batch; it only affects speed and memory.
        n_samples: answers per record; with several, the score also has ``majority_accuracy`` and ``pass_at``.
        temperature: 0 is greedy, only for one answer per record.
        generator: a ``torch.Generator`` on the CPU, which gives one seed per answer.
        think: False starts the turn with an empty think block and the tag ``<answer>``.
        report: called after each batch with the number of answers so far and of all answers.
        sampling: other options of ``complete``.

    Raises:
        UserError: no records; a record whose last turn is not an assistant's, whose ``final`` is not text, or that
            leaves no position for an answer; n_samples below 1, or above 1 at temperature 0.
    """
    if n_samples < 1:
        raise UserError(f"n_samples {n_samples}: must be at least 1")
    if n_samples > 1 and SamplingOptions(temperature=temperature).greedy:
        raise UserError(f"n_samples {n_samples} at temperature {temperature}: all would be equal; raise it, say to 0.8")
    tasks = [read_task(number, record) for number, record in enumerate(records)]
    if not tasks:
        raise UserError("no records to measure reasoning on")
    expected = [_expected(number, task.turns[-1]["content"], task.extra) for number, task in enumerate(tasks)]
    prompts = _prompts(model, tokenizer, tasks, think=think)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # batches of similar lengths
    queue = [number for number in order for _ in range(n_samples)]
    completions_of: dict[int, list[Completion]] = {number: [] for number in order}
    for first in progress(range(0, len(queue), batch_size), desc="answering", unit="batch"):
        batch = queue[first : first + batch_size]
        completions = complete(
            model,
            [prompts[number] for number in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=tokenizer.end_ids,
            generator=generator,
            tokenizer=tokenizer,
            **sampling,
        )
        for number, completion in zip(batch, completions, strict=True):
            completions_of[number].append(completion)
        report(first + len(batch), len(queue))
    opened = chat_format(tokenizer).opens_with if think else DIRECT
    answers = []
    for number, task in enumerate(tasks):
        completions = completions_of[number]
        texts = [opened + completion.text for completion in completions]
        parsed = list(map(read_answer, texts))
        if think:
            given_answers = [parts.answer for parts in parsed]
        else:  # the prompt has already opened the answer: it is the text up to the closing tag
            given_answers = [completion.text.partition("</answer>")[0].strip() for completion in completions]
        answers.append(
            ReasonedAnswer(
                task=str(task.extra.get("task", "all")),
                group=str(task.extra.get("group", "")),
                question=task.turns[-2].get("content") or "",
                expected=expected[number],
                texts=texts,
                answers=given_answers,
                correct=[same_answer(answer, expected[number]) for answer in given_answers],
                well_formed=[parts.well_formed for parts in parsed],
                n_tokens=[len(completion.ids) for completion in completions],
            )
        )
    return ReasoningScore(answers=answers)


def read_answer(text: str) -> ReadAnswer:
    """Return the answer and the thinking of ``text``, as far as they can be separated, and whether it has the form."""
    try:
        thinking, answer = parse_reasoning(text)
        return ReadAnswer(answer, thinking, True)
    except UserError:
        _, tag, thinking = text.partition("<think>")
        return ReadAnswer(find_answer(text), thinking.partition("</think>")[0].strip() if tag else "", False)


def final_answer(content: str, extra: dict) -> str:
    """Return the right answer: ``final`` of the record, else the answer block of the last turn.

    Raises:
        UserError: ``final`` is not text, or there is none and the turn lacks the form.
    """
    final = extra.get("final")
    if final is None:
        return parse_reasoning(content).answer
    if not isinstance(final, str) or not final.strip():
        raise UserError(f"final is {final!r}; it must be the answer as a text, such as '8'")
    return final.strip()


def majority(answers: Sequence[str]) -> str | None:
    """Return the most frequent answer (of equally frequent ones the first), or None if there are none."""
    votes: dict[str, int] = {}
    for answer in answers:
        candidate = next((candidate for candidate in votes if same_answer(answer, candidate)), answer)
        votes[candidate] = votes.get(candidate, 0) + 1
    return max(votes, key=votes.get, default=None)


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """Return the probability that k of n answers, drawn without replacement, contain one of ``n_correct`` right ones.

    It is an unbiased estimate for k new answers; ``1 − (1 − n_correct/n)^k`` is biased (Chen et al., Evaluating Large
    Language Models Trained on Code, 2021, equation 1).
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} of {n} answers: k must be 1 to {n}; draw more answers")
    return 1 - math.comb(n - n_correct, k) / math.comb(n, k)


def _expected(number: int, content: str, extra: dict) -> str:
    if extra.get("final") is None and not read_answer(content).well_formed:
        return content.strip()
    try:
        return final_answer(content, extra)
    except UserError as error:
        raise UserError(f"record {number}: {error}") from None


def _prompts(model, tokenizer, tasks: list[Task], *, think: bool) -> list[list[int]]:
    """Return the ids before each answer; without thinking they include the start of the answer's turn."""
    conversations, tools = [task.turns[:-1] for task in tasks], [task.tools for task in tasks]
    if think:
        encoded = encode_chats(tokenizer, conversations, tools=tools, add_generation_prompt=True)
        prompts = [ids for ids, _ in encoded]
    else:
        prompts = encode_started(tokenizer, conversations, start=DIRECT, tools=tools)
    limit = model.config.max_position_embeddings
    for number, ids in enumerate(prompts):
        if len(ids) >= limit:
            raise UserError(
                f"record {number} has {len(ids)} tokens before its answer and the model reads {limit}: shorten or "
                "remove it"
            )
    return prompts
