"""Multiple choice: is the right choice the most probable one?

Three ways to ask (``style``):

    letters   the question with its choices, lettered; the answers are the letters (MMLU, C-Eval, CMMLU)
    texts     the question alone; the answers are the texts of the choices (ARC, PIQA, HellaSwag)
    blank     the choices fill the blank ``_``; the answer is the rest of the sentence (WinoGrande; Trinh and Le, A
              Simple Method for Commonsense Reasoning, 2018: partial scoring)

A longer text is less probable, so the texts are also compared per byte and per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from minillm.errors import UserError
from minillm.evaluation.likelihood import answer_likelihoods
from minillm.evaluation.questions import Counted, Question, choose_examples, unique_questions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Style = Literal["letters", "texts", "blank"]


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The words around questions and answers; ``EN`` and ``ZH`` are the usual ones."""

    question: str = "{question}"
    """The question's line; ``{question}`` is replaced."""
    cue: str = "\nAnswer:"
    """What follows the question and its lettered choices."""
    delimiter: str = " "
    """Between the cue and the answer; it belongs to the answer."""
    description: str = ""
    """The beginning of every prompt; ``{subject}`` is replaced."""
    subject_names: tuple[tuple[str, str], ...] = ()
    """(subject, its name in the description); others are written with spaces for ``_``."""

    def ask(self, question: Question, *, style: Style) -> str:
        """Return the question up to the answer."""
        lines = self.question.replace("{question}", question.question.strip())
        if style == "letters":
            lines += "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
        return lines + self.cue

    def describe(self, subject: str) -> str:
        """Return the description for a subject."""
        return self.description.replace("{subject}", self.name_of(subject))

    def name_of(self, subject: str) -> str:
        """Return the name of a subject in the description."""
        return dict(self.subject_names).get(subject, subject.replace("_", " "))


EN = PromptFormat()
ZH = PromptFormat(cue="\n答案：", delimiter="")


@dataclass(frozen=True, kw_only=True)
class ScoredQuestion:
    """The outcome of one question; the lists have an entry per choice."""

    id: str
    subject: str
    answer: int
    log_likelihoods: list[float]
    """Nats, summed over the tokens of the answer."""
    n_tokens: list[int]
    n_bytes: list[int]
    """UTF-8 bytes of the answers, without the blank before them."""

    @property
    def choice(self) -> int:
        """Return the most probable choice; of equally probable ones the first."""
        return self._best([1] * len(self.n_tokens))

    @property
    def choice_per_byte(self) -> int:
        """Return the choice with the highest log-likelihood per byte."""
        return self._best(self.n_bytes)

    @property
    def choice_per_token(self) -> int:
        """Return the choice with the highest log-likelihood per token."""
        return self._best(self.n_tokens)

    @property
    def correct(self) -> bool:
        """Return whether the most probable choice is the right one."""
        return self.choice == self.answer

    def _best(self, lengths: list[int]) -> int:
        values = [value / length for value, length in zip(self.log_likelihoods, lengths, strict=True)]
        return values.index(max(values))


@dataclass(frozen=True, kw_only=True)
class Score(Counted):
    """The outcome of all questions; ``Counted`` has ``accuracy``, ``interval``, ``subjects``, ``subject_average``."""

    questions: list[ScoredQuestion]
    """In the order of the records."""
    style: Style
    n_shot: int
    n_truncated: int
    """Questions whose prompt was longer than the model's positions and lost its beginning."""

    @property
    def chance(self) -> float:
        """Return the expected accuracy of guessing: the mean of 1 / number of choices."""
        return sum(1 / len(question.n_tokens) for question in self.questions) / len(self.questions)

    @property
    def accuracy_normalized(self) -> float:
        """Return the accuracy if log-likelihoods are compared per byte."""
        return sum(q.choice_per_byte == q.answer for q in self.questions) / len(self.questions)

    @property
    def accuracy_per_token(self) -> float:
        """Return the accuracy if log-likelihoods are compared per token."""
        return sum(q.choice_per_token == q.answer for q in self.questions) / len(self.questions)

    def as_dict(self, *, questions: bool = True) -> dict:
        """Return the figures, and with ``questions`` every question, as plain values for JSON."""
        values = self.counts() | {name: getattr(self, name) for name in ("style", "n_shot", "n_truncated")}
        values |= {"accuracy_normalized": self.accuracy_normalized, "accuracy_per_token": self.accuracy_per_token}
        values["subjects"] = [asdict(score) | {"accuracy": score.accuracy} for score in self.subjects]
        if questions:
            values["questions"] = [
                asdict(question) | {"choice": question.choice, "correct": question.correct}
                for question in self.questions
            ]
        return values


def multiple_choice(
    model,
    tokenizer,
    records: Iterable[dict | Question],
    *,
    style: Style = "letters",
    n_shot: int = 0,
    examples: Iterable[dict | Question] = (),
    same_subject: bool = True,
    prompt: PromptFormat = EN,
    batch_size: int = 16,
) -> Score:
    """Return how often the right choice is the most probable one under ``model``.

    Args:
        records: ``{"id", "question", "choices", "answer", "subject"?}``; the answer is an index from 0.
        style: see above.
        n_shot: questions with their answers before each question: the first of ``examples``, never the question itself.
        examples: where they are taken from, in the format of ``records``.
        same_subject: only take examples of the question's own subject.
        prompt: the words around them.
        batch_size: questions per forward pass; it only affects speed and memory.

    Log-likelihoods are computed in at least float32 and summed in float64.

    Raises:
        UserError: no records; a record that is not a question with choices; ids that occur twice; fewer examples than
            ``n_shot``; style ``blank`` and a question without a ``_``; an answer longer than the model's positions.
    """
    if style not in ("letters", "texts", "blank"):
        raise UserError(f"style {style!r}: letters, texts or blank")
    if n_shot < 0:
        raise UserError(f"n_shot {n_shot}: must be at least 0")
    questions = unique_questions(records)
    if not questions:
        raise UserError("there are no questions to measure")
    pool = unique_questions(examples, what="example")
    check_style([*questions, *(pool if n_shot else [])], style)
    pool_of = choose_pool(pool, same_subject=same_subject)
    groups = []
    for question in questions:
        shots = choose_examples(question, pool_of(question), n_shot=n_shot, same_subject=same_subject)
        groups.append(choice_texts(question, shots, style=style, prompt=prompt))
    result = answer_likelihoods(model, tokenizer, groups, batch_size=batch_size)
    scored = [
        ScoredQuestion(
            id=question.id,
            subject=question.subject,
            answer=question.answer,
            log_likelihoods=[likelihood.log_likelihood for likelihood in likelihoods],
            n_tokens=[likelihood.n_tokens for likelihood in likelihoods],
            n_bytes=[len(answer.strip().encode()) for _, answer in group],
        )
        for question, group, likelihoods in zip(questions, groups, result.groups, strict=True)
    ]
    return Score(questions=scored, style=style, n_shot=n_shot, n_truncated=result.n_truncated)


def choice_texts(
    question: Question, shots: list[Question], *, style: Style, prompt: PromptFormat
) -> list[tuple[str, str]]:
    """Return the prompt and the answer of each choice."""
    before = prompt.describe(question.subject)
    before += "".join(f"{_answered(shot, style=style, prompt=prompt)}\n\n" for shot in shots)
    if style == "blank":
        start, _, end = question.question.partition("_")
        return [(before + start + choice, " " + end.strip()) for choice in question.choices]
    asked = before + prompt.ask(question, style=style)
    return [(asked, prompt.delimiter + answer) for answer in _answers(question, style)]


def choose_pool(pool: list[Question], *, same_subject: bool) -> Callable[[Question], list[Question]]:
    """Return a function of a question that gives the part of the pool to choose its examples from."""
    if not same_subject:
        return lambda question: pool
    by_subject: dict[str, list[Question]] = {}
    for example in pool:
        by_subject.setdefault(example.subject, []).append(example)
    return lambda question: by_subject.get(question.subject, [])


def _answered(question: Question, *, style: Style, prompt: PromptFormat) -> str:
    if style == "blank":
        start, _, end = question.question.partition("_")
        return f"{start}{question.choices[question.answer]} {end.strip()}"
    return prompt.ask(question, style=style) + prompt.delimiter + _answers(question, style)[question.answer]


def _answers(question: Question, style: Style) -> list[str]:
    if style == "letters":
        return list(LETTERS[: len(question.choices)])
    return [choice.strip() for choice in question.choices]


def check_style(questions: Iterable[Question], style: Style) -> None:
    """Raise ``UserError`` for the first question that cannot be asked in this style."""
    for question in questions:
        where = question.where or question.id
        if not question.choices:
            raise UserError(f"{where}: no choices to compare: give choices and answer")
        if style == "letters" and len(question.choices) > len(LETTERS):
            raise UserError(f"{where}: {len(question.choices)} choices and {len(LETTERS)} letters: use style='texts'")
        if style == "blank" and not question.question.partition("_")[2].strip():
            raise UserError(f"{where}: style 'blank' needs a question with a blank '_' and words behind it")
