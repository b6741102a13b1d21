"""Judged answers for KTO, each with an answer to another question.

KTO needs a baseline: how far the model has moved from its reference on answers that do not belong to their questions
(Ethayarajh et al., KTO, 2024, section 4.1). So each question is also paired with the answer to another question.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from minillm.data.schema import Record
from minillm.errors import UserError


def mismatched(records: Iterable[Record]) -> Iterator[Record]:
    """Yield judged records with ``rejected`` set to an answer to the question before it (the first one: after it).

    A preference counts as two records: its chosen reply is good, its rejected one bad. Consecutive records with equal
    questions form a group; they never get each other's answers.

    Raises:
        UserError: there is only one question.
    """
    previous_group: list[Record] = []
    n_groups = 0
    for _, same_question in groupby(_judged(records), key=lambda record: record.messages):
        group = list(same_question)
        n_groups += 1
        if n_groups == 2:
            yield from _with_answers_of(group, previous_group)
        if n_groups >= 2:
            yield from _with_answers_of(previous_group, group)
        previous_group = group
    if n_groups == 1:
        raise UserError(
            "all judged answers are to one question, but kto compares with answers to other questions: give at least "
            "two questions"
        )


def _judged(records: Iterable[Record]) -> Iterator[Record]:
    """Yield judged records unchanged, and two judged records for each preference."""
    for record in records:
        if record.kind == "judged":
            yield record
        else:
            yield replace(record, kind="judged", label=True, rejected=None)
            yield replace(record, kind="judged", label=False, chosen=record.rejected, rejected=None)


def _with_answers_of(other_group: list[Record], group: list[Record]) -> Iterator[Record]:
    """Yield the records of ``group`` with ``rejected`` set to the answers of ``other_group``, in turn."""
    for index, record in enumerate(group):
        yield replace(record, rejected=other_group[index % len(other_group)].chosen)
