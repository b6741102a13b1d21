"""Decontamination: does a record contain a question of an evaluation file?

As in GPT-3 (Brown et al. 2020, arXiv:2005.14165, appendix C), a record is contaminated if it shares a run of 13 units
with a question. A unit is a word or a Chinese character (``units.py``). A question of 8 to 12 units counts if the
record holds all of it in a row. Shorter questions are found everywhere: they are only counted, not looked for.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data.prepare.contents import questions_of
from minillm.data.prepare.units import ngrams, split_units
from minillm.data.schema import parse_record
from minillm.data.sources.columns import QUESTIONS
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.raw_records import check_file, read_raw
from minillm.errors import UserError

NGRAM = 13
SHORTEST = 8  # units of a question that is looked for


class Overlap:
    """The n-grams of some texts, to find texts that share one.

    Args:
        texts: (where it comes from, the text).
        ngram: units in a row that must be equal.

    Attributes:
        n_texts, n_too_short: number of texts, and of those with fewer than ``SHORTEST`` units (or ``ngram``, if less).
    """

    def __init__(self, texts: Iterable[tuple[str, str]], *, ngram: int = NGRAM):
        self.n_texts = self.n_too_short = 0
        self._places: dict[int, dict[str, str]] = {}  # length in units: {n-gram: where it comes from}
        for place, text in texts:
            units = split_units(text)
            self.n_texts += 1
            if len(units) < min(SHORTEST, ngram):
                self.n_too_short += 1
                continue
            n = min(ngram, len(units))
            places = self._places.setdefault(n, {})
            for run in ngrams(units, n):
                places.setdefault(run, place)

    def find(self, texts: list[list[str]]) -> tuple[str, str] | None:
        """Return (the shared run of units, where it comes from) of the first overlap in texts, or None.

        Args:
            texts: the units of each text.
        """
        for units in texts:
            for n, places in self._places.items():
                for run in ngrams(units, n):
                    if run in places:
                        return run, places[run]
        return None


def read_questions(path: str | list) -> Iterator[tuple[str, str]]:
    """Yield (``file:line``, question) of evaluation files.

    The question of a record is what the user asks; of multiple choice and other records that are not training data, the
    value under one of the keys of ``QUESTIONS``; of a text, all of it.

    Raises:
        UserError: a file that cannot be read, or a record without a question.
    """
    for file in expand_paths(path):
        for line, _, value in read_raw(check_file(file)):
            for question in _questions(file, line, value):
                yield f"{file}:{line}", question


def _questions(file: Path, line: int, value: object) -> list[str]:
    if isinstance(value, UserError):
        raise UserError(f"{file}, line {line}: {value}")
    if isinstance(value, dict):
        question = next((value[key] for key in QUESTIONS if isinstance(value.get(key), str)), None)
        if question is not None:
            context = value["input"] if isinstance(value.get("input"), str) and value["input"] != question else ""
            return ["\n".join(filter(None, [question, context]))]
    try:
        return questions_of(parse_record(value, line))
    except UserError as error:
        raise UserError(
            f"--eval_files {file}, line {line}: no question found ({error}). Published suites are converted by "
            "python -m minillm.evaluation.harness tasks --suite NAME --suite_dir DIR --output eval"
        ) from None
