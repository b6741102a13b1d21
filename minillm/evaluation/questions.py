"""Questions of a suite, and what is counted over all of them.

A question with choices is ``{"id", "question", "choices": [str], "answer": int (0-based), "subject"}``. One whose
answer is a number has ``"final"`` instead of choices and answer.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from minillm.errors import UserError
from minillm.evaluation.statistics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its choices, or with a number as its answer."""

    id: str
    question: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    """Index of the right choice, from 0; −1 without choices."""
    final: str = ""
    """Without choices: the right answer as a text, such as 18."""
    solution: str = ""
    """Without choices: a text that leads to the answer, for few-shot examples."""
    subject: str = "all"
    where: str = ""
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True)
class SubjectScore:
    """The score of one subject."""

    subject: str
    n: int
    n_correct: int

    @property
    def accuracy(self) -> float:
        """Return the share of right answers, 0 to 1."""
        return self.n_correct / self.n


class Counted:
    """What scores have in common: shares and intervals from ``questions``, each with ``subject`` and ``correct``."""

    @property
    def n_correct(self) -> int:
        """Return the number of right answers."""
        return sum(question.correct for question in self.questions)

    @property
    def accuracy(self) -> float:
        """Return the share of right answers over all questions, 0 to 1."""
        return self.n_correct / len(self.questions)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of ``accuracy`` (Wilson)."""
        return wilson_interval(self.n_correct, len(self.questions))

    @property
    def subjects(self) -> list[SubjectScore]:
        """Return a score per subject, sorted by name."""
        correct_of: dict[str, list[bool]] = {}
        for question in self.questions:
            correct_of.setdefault(question.subject, []).append(question.correct)
        return [
            SubjectScore(subject=subject, n=len(correct), n_correct=sum(correct))
            for subject, correct in sorted(correct_of.items())
        ]

    @property
    def subject_average(self) -> float:
        """Return the mean of the subjects' accuracies: each has the same weight, whatever its number of questions."""
        subjects = self.subjects
        return sum(score.accuracy for score in subjects) / len(subjects)

    def counts(self) -> dict:
        """Return the figures that every score has, for JSON."""
        return {
            "n": len(self.questions),
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "chance": self.chance,
            "subject_average": self.subject_average,
        }


def parse_question(record: dict, where: str) -> Question:
    """Return the question of a record in the format above.

    Raises:
        UserError: a key is missing or has a wrong value; the message begins with ``where``.
    """

    def require(is_valid: bool, message: str) -> None:
        if not is_valid:
            raise UserError(f"{where}: {message}")

    require(isinstance(record, dict), "not a JSON object: give id, question, choices, answer, subject")
    try:
        json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: a lone surrogate, which has no UTF-8 form: repair the \\u escapes") from None
    number = record.get("id")
    texts = {"id": where if number is None else str(number), "question": record.get("question"), "where": where}
    texts["subject"] = str(record.get("subject") or "all")
    require(isinstance(texts["question"], str) and bool(texts["question"].strip()), "question must be a text")
    if "choices" not in record:
        final, solution = record.get("final"), record.get("solution", "")
        require(isinstance(final, str) and bool(final.strip()), "neither choices and answer, nor final (a text)")
        require(isinstance(solution, str), "solution must be a text")
        return Question(**texts, final=final.strip(), solution=solution)
    choices, answer = record["choices"], record.get("answer")
    is_texts = isinstance(choices, list | tuple) and all(isinstance(choice, str) for choice in choices)
    require(is_texts and len(choices) >= 2, "choices must be a list of at least two texts")
    for number, choice in enumerate(choices):
        require(bool(choice.strip()), f"choice {number} is empty: remove the question, or give the choice a text")
    require(type(answer) is int, f"answer is {answer!r}; it must be the index of the right choice, from 0")
    require(
        0 <= answer < len(choices),
        f"answer {answer} with {len(choices)} choices: it is an index from 0, so give 0 to {len(choices) - 1}",
    )
    return Question(**texts, choices=tuple(choices), answer=answer)


def unique_questions(records: Iterable[dict | Question], *, what: str = "record") -> list[Question]:
    """Return the records as questions.

    Raises:
        UserError: none; one that is not a question; two with the same id.
    """
    questions, where_of = [], {}
    for number, record in enumerate(records):
        question = record if isinstance(record, Question) else parse_question(record, f"{what} {number}")
        where = question.where or f"{what} {number}"
        if question.id in where_of:
            raise UserError(f"{where}: id {question.id!r} is also that of {where_of[question.id]}: ids must be unique")
        where_of[question.id] = where
        questions.append(question)
    return questions


def choose_examples(
    question: Question, pool: list[Question], *, n_shot: int, same_subject: bool = True
) -> list[Question]:
    """Return the first ``n_shot`` questions of the pool for a prompt, but not one with the text of ``question`` itself.

    Ids are not compared: two files of one release may both count from 0.

    Raises:
        UserError: the pool has fewer.
    """
    if n_shot == 0:
        return []
    asked = (question.question.strip(), question.choices)
    others = (
        example
        for example in pool
        if (not same_subject or example.subject == question.subject)
        and (example.question.strip(), example.choices) != asked
    )
    chosen = list(islice(others, n_shot))
    if len(chosen) < n_shot:
        of_subject = f" of the subject {question.subject!r}" if same_subject else ""
        raise UserError(
            f"--n_shot {n_shot}: {question.where or question.id} has only {len(chosen)} other questions{of_subject} to "
            "choose examples from: lower --n_shot, or give more examples"
        )
    return chosen
