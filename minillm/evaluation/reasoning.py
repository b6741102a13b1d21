"""Reasoned answers, ``<think>…</think><answer>…</answer>``: are they right, have they the form, do more samples help?

A record's last turn is the expected answer, reasoned or plain, and ``final``, where it is there, the part that is
compared. Asked to think, a model writes both blocks; asked directly, its turn is begun for it with a block of thinking
that is empty, so that what it gains by thinking can be measured.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from minillm.data.reasoning import find_answer, parse_reasoning, same_answer
from minillm.data.schema import Record
from minillm.errors import UserError
from minillm.evaluation.exact_match import task_fields
from minillm.inference import Completion, SamplingOptions, complete
from minillm.terminal import progress
from minillm.tokenizer import encode_chats
from minillm.tokenizer.chat_format import chat_format

DIRECT = "<think>\n\n</think>\n<answer>\n"  # the beginning of an answer without thinking


class ReadAnswer(NamedTuple):
    """What an answer says, whether or not it has the form."""

    answer: str
    thinking: str
    """Up to the end of the text if the block was never closed; empty without a block."""
    well_formed: bool


@dataclass(frozen=True, kw_only=True)
class ReasonedAnswer:
    """One record's outcome: lists over its samples, in the order they were drawn."""

    task: str
    group: str
    question: str
    """The last turn before the answer."""
    expected: str
    texts: list[str]
    """The whole turns, special tokens left out."""
    answers: list[str]
    correct: list[bool]
    well_formed: list[bool]
    n_tokens: list[int]
    """New tokens, the end of the turn among them."""

    @property
    def majority_correct(self) -> bool:
        """Return whether the most frequent well-formed answer is right; without one it is not."""
        votes = [answer for answer, formed in zip(self.answers, self.well_formed, strict=True) if formed]
        chosen = majority(votes)
        return chosen is not None and same_answer(chosen, self.expected)


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
        """Return the share of right answers over all samples, 0 to 1: exact match where there is one per record."""
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
        """Return the figures, those of the groups, and every answer if wanted, as plain values for JSON."""
        values = {"n": len(self.answers), "n_samples": self.n_samples} | self._figures()
        groups = [
            {"task": task, "group": group, "n": len(score.answers)} | score._figures()
            for (task, group), score in self.groups.items()
        ]
        return values | {"groups": groups} | ({"answers": list(map(asdict, self.answers))} if answers else {})

    def table(self) -> str:
        """Return a table for people: a line per task and group, then one for all."""
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
    """Return how many answers are right and have the form, with the thinking or without it.

    Args:
        records: as for ``exact_match``, with ``final`` next to them where the last turn is more than the answer.
        batch_size: answers written together; it changes nothing but speed and memory.
        n_samples: answers per record; with several the score has ``majority_accuracy`` and ``pass_at`` too.
        temperature: 0 is greedy, for one answer per record alone.
        generator: a ``torch.Generator`` on the CPU, which draws one seed per answer.
        think: False begins the turn with an empty block of thinking and the tag ``<answer>``.
        report: called after each batch with the number of answers there are and will be.
        sampling: other options of ``complete``.

    Raises:
        UserError: no records; a record whose last turn is not an assistant's, whose ``final`` is not text, or that
            leaves no position for an answer; n_samples below 1, or above 1 at temperature 0.
    """
    if n_samples < 1:
        raise UserError(f"n_samples {n_samples}: must be at least 1")
    if n_samples > 1 and SamplingOptions(temperature=temperature).greedy:
        raise UserError(f"n_samples {n_samples} at temperature {temperature}: all would be equal; raise it, say to 0.8")
    fields = [task_fields(number, record) for number, record in enumerate(records)]
    if not fields:
        raise UserError("no records to measure reasoning on")
    expected = [_expected(number, turns[-1]["content"], extra) for number, (turns, extra) in enumerate(fields)]
    prompts = _prompts(model, tokenizer, [turns[:-1] for turns, _ in fields], think=think)
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))  # batches of similar lengths
    waiting = [number for number in order for _ in range(n_samples)]
    done: dict[int, list[Completion]] = {number: [] for number in order}
    for first in progress(range(0, len(waiting), batch_size), desc="answering", unit="batch"):
        batch = waiting[first : first + batch_size]
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
            done[number].append(completion)
        report(first + len(batch), len(waiting))
    opened = chat_format(tokenizer).opens_with if think else DIRECT
    answers = []
    for number, (turns, extra) in enumerate(fields):
        texts = [opened + each.text for each in done[number]]
        found = list(map(read_answer, texts))
        said = [each.answer for each in found]
        if not think:  # the answer is begun already: it is what follows, and no later block
            said = [each.text.partition("</answer>")[0].strip() for each in done[number]]
        answers.append(
            ReasonedAnswer(
                task=str(extra.get("task", "all")),
                group=str(extra.get("group", "")),
                question=turns[-2].get("content") or "",
                expected=expected[number],
                texts=texts,
                answers=said,
                correct=[same_answer(answer, expected[number]) for answer in said],
                well_formed=[each.well_formed for each in found],
                n_tokens=[len(each.ids) for each in done[number]],
            )
        )
    return ReasoningScore(answers=answers)


def read_answer(text: str) -> ReadAnswer:
    """Return the answer and the thinking of ``text``, as far as they can be told apart, and whether it has the form."""
    try:
        thinking, answer = parse_reasoning(text)
        return ReadAnswer(answer, thinking, True)
    except UserError:
        _, tag, thinking = text.partition("<think>")
        return ReadAnswer(find_answer(text), thinking.partition("</think>")[0].strip() if tag else "", False)


def final_answer(content: str, extra: dict) -> str:
    """Return the answer that counts: ``final`` of the record, else the one in the last turn's form.

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
    """Return the most frequent answer, of equally frequent ones the one that came first; None if there are none."""
    votes: dict[str, int] = {}
    for answer in answers:
        known = next((known for known in votes if same_answer(answer, known)), answer)
        votes[known] = votes.get(known, 0) + 1
    return max(votes, key=votes.get, default=None)


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """Return the chance that k of n answers, drawn without replacement, hold a right one of the ``n_correct``.

    It is an unbiased estimate for k fresh answers, which ``1 − (1 − n_correct/n)^k`` is not (Chen et al., Evaluating
    Large Language Models Trained on Code, 2021, equation 1).
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


def _prompts(model, tokenizer, conversations: list[list[dict]], *, think: bool) -> list[list[int]]:
    """Return the ids before each answer, for a direct one with the beginning of its turn."""
    if think:
        prompts = [ids for ids, _ in encode_chats(tokenizer, conversations, add_generation_prompt=True)]
    else:  # a turn that says nothing else, without its end
        begun = {"role": "assistant", "content": DIRECT}
        encoded = encode_chats(tokenizer, [[*turns, begun] for turns in conversations], train_on="last")
        prompts = [ids[: len(ids) - 1 - mask[::-1].index(1)] for ids, mask in encoded]
    limit = model.config.max_position_embeddings
    for number, ids in enumerate(prompts):
        if len(ids) >= limit:
            raise UserError(
                f"record {number} has {len(ids)} tokens before its answer and the model reads {limit}: shorten or "
                "remove it"
            )
    return prompts
