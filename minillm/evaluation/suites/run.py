"""Measures a model on a suite by its name."""

from pathlib import Path

import torch

from minillm.errors import UserError
from minillm.evaluation.multiple_choice import Score, multiple_choice
from minillm.evaluation.questions import Question
from minillm.evaluation.suites.numbers import NumberScore, measure_numbers
from minillm.evaluation.suites.table import find_suite, read_suite
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
    questions, examples, _ = read_suite(suite, data_dir, with_examples=n_shot > 0)
    settings = {"n_shot": n_shot, "examples": examples or questions, "batch_size": batch_size, "prompt": suite.prompt}
    chosen = evenly_spaced(questions, limit)
    if suite.style == "number":
        return measure_numbers(model, tokenizer, chosen, max_new_tokens=max_new_tokens, chat=chat, **settings)
    return multiple_choice(model, tokenizer, chosen, style=suite.style, **settings)


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
