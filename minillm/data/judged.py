"""Judged answers for KTO, each next to the answer to another question.

KTO's baseline is how far the model has moved from its reference on answers that do not belong to their questions
(Ethayarajh et al., KTO, 2024, section 4.1): question i meets the answer to another one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby

from minillm.data.schema import Record
from minillm.errors import UserError


def mismatched(records: Iterable[Record]) -> Iterator[Record]:
    """Yield judged records with ``rejected`` set to the answer to a question before (for the first, to the next).

    A preference counts as two of them: its chosen reply is good, its rejected one bad. Answers to equal questions
    that stand side by side are not taken for each other's.

    Raises:
        UserError: there is only one question.
    """
    previous: list[Record] = []
    first: list[Record] | None = None
    for _, same in groupby(_judged(records), key=lambda record: record.messages):
        group = list(same)
        if not previous:
            first = group
        elif first is not None:
            yield from _beside(first, group)
            first = None
        if previous:
            yield from _beside(group, previous)
        previous = group
    if first is not None:
        raise UserError(
            "the judged answers are all to one question: kto compares with answers to others, so give at least two"
        )


def _judged(records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
        if record.kind == "judged":
            yield record
        else:
            yield replace(record, kind="judged", label=True, rejected=None)
            yield replace(record, kind="judged", label=False, chosen=record.rejected, rejected=None)


def _beside(group: list[Record], other: list[Record]) -> Iterator[Record]:
    for place, record in enumerate(group):
        yield replace(record, rejected=other[place % len(other)].chosen)
