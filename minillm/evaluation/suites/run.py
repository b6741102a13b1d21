"""Measures a model on a suite by its name."""

from pathlib import Path

import torch

from minillm.errors import UserError
from minillm.evaluation.multiple_choice import Score, check_style, choose_pool, multiple_choice
from minillm.evaluation.questions import Question, choose_examples
from minillm.evaluation.suites.numbers import NumberScore, measure_numbers
from minillm.evaluation.suites.table import Suite, find_suite, read_suite
from minillm.model import Transformer


def run_suite(
    name: str,
    model,
    tokenizer,
    *,
    data_dir: str | Path,
    n_shot: int = 0,
    limit: int = 0,
    batch_size: int = 16,
    max_new_tokens: int = 256,
    chat: bool = False,
) -> Score | NumberScore:
    """Return the score of ``model`` on a suite of ``SUITES``.

    Args:
        data_dir: directory with the suite's files: our JSON Lines or an original release.
        n_shot: answered questions before each question: from the suite's own examples (same subject), or if it has
            none from its other questions.
        limit: measure this many questions, evenly spaced over the files; 0: all.
        batch_size: questions per forward pass. max_new_tokens: longest answer of suites of numbers.
        chat: ask suites of numbers in the chat format. Choices are always compared as plain text.

    Raises:
        UserError: an unknown suite; no files of it; a wrong record; fewer examples than ``n_shot``.
    """
    suite = find_suite(name)
    chosen, examples = _read(suite, data_dir, n_shot=n_shot, limit=limit)
    settings = {"n_shot": n_shot, "examples": examples, "batch_size": batch_size, "prompt": suite.prompt}
    if suite.style == "number":
        return measure_numbers(model, tokenizer, chosen, max_new_tokens=max_new_tokens, chat=chat, **settings)
    return multiple_choice(model, tokenizer, chosen, style=suite.style, **settings)


def check_suite(suite: Suite, data_dir: str | Path, *, n_shot: int = 0, limit: int = 0) -> None:
    """Raise the ``UserError`` with which ``run_suite`` would end because of the files, without a model."""
    questions, examples = _read(suite, data_dir, n_shot=n_shot, limit=limit)
    if suite.style != "number":
        check_style([*questions, *(examples if n_shot else [])], suite.style)
    pool_of = choose_pool(examples, same_subject=suite.style != "number")
    for question in questions:
        choose_examples(question, pool_of(question), n_shot=n_shot, same_subject=suite.style != "number")


def _read(suite: Suite, data_dir: str | Path, *, n_shot: int, limit: int) -> tuple[list[Question], list[Question]]:
    """Return the questions to measure, and those from which examples are chosen."""
    questions, examples, _ = read_suite(suite, data_dir, with_examples=n_shot > 0)
    return evenly_spaced(questions, limit), examples or questions


def evenly_spaced(questions: list[Question], limit: int) -> list[Question]:
    """Return ``limit`` of the questions, evenly spaced: files are sorted by subject. 0: all."""
    if limit < 0:
        raise UserError(f"limit {limit}: must be at least 0 (0: all questions)")
    if not 0 < limit < len(questions):
        return questions
    return [questions[number * len(questions) // limit] for number in range(limit)]


def random_model(model, *, seed: int = 0) -> Transformer:
    """Return an untrained model of the same configuration, on the same device and in the same dtype."""
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = Transformer(model.config)
    return untrained.to(parameter.device, parameter.dtype).eval()
