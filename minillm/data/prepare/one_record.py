"""What is done to one record: read, clean, check the limits, look for questions, compute its hashes."""

import json
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from minillm.data.prepare.contents import change_texts, texts_of, to_json
from minillm.data.prepare.exact import content_hash
from minillm.data.prepare.near import shingles, signature
from minillm.data.prepare.overlap import Overlap
from minillm.data.prepare.rules import change_functions, drop_reason, remove_control_from
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.units import SplitTexts
from minillm.data.records import with_our_names
from minillm.data.schema import Record, parse_record
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError
from minillm.tokenizer import load_tokenizer

EXCERPT = 80  # characters of an example in the report


class RawRecord(NamedTuple):
    """A record as it was read."""

    file_index: int
    file: str
    line: int
    value: object  # a JSON value, or the UserError that says why there is none
    raw: str | None  # of a broken record
    is_table: bool
    is_reference: bool  # of --against: only compared with, neither limited nor written


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a record. ``rule`` is "" for a record that goes on; only such a record has the last four."""

    file_index: int
    line_number: int
    rule: str
    line: bytes  # the record, or the entry for the file of dropped records, as one line of JSON
    changes: tuple[tuple[str, str, str], ...] = ()  # (rule, excerpt before, excerpt after)
    reason: str = ""
    hash: bytes = b""
    size: int = 0
    is_valid: bool = False
    signature: np.ndarray | None = None


class Cleaner:
    """Applies the settings to records, one at a time. Each process has its own.

    Args:
        kind: kind of the records that are wanted.
        questions: of the evaluation files, or None.
    """

    def __init__(self, settings: PrepareSettings, *, kind: str, questions: Overlap | None):
        self.settings, self.kind, self.questions = settings, kind, questions
        self.columns = parse_columns(settings.columns)
        self.changes = change_functions(settings)
        self.tokenizer = load_tokenizer(settings.tokenizer_path) if settings.counts_tokens else None
        self.held_out = DataFiles("", valid_ratio=settings.valid_ratio, side="valid")

    def __call__(self, raw: RawRecord) -> Outcome:
        """Return what became of a record."""
        value, changes = raw.value, []
        if not self.settings.keep_control_characters and not isinstance(value, UserError):
            cleaned = remove_control_from(value)
            if cleaned != value:
                changes.append(("control_characters", *_difference(value, cleaned)))
                value = cleaned
        try:
            record = parse_record(with_our_names(value, self.columns, raw.is_table), raw.line)
        except UserError as error:
            return dropped(raw, "unreadable", str(error))
        if record.kind != self.kind:
            return dropped(raw, "other_kind", f"a {record.kind} record: {self.kind} records are wanted (--kind)")
        for rule, change in self.changes:
            changed = change_texts(record, change)
            if changed is not record:
                changes.append((rule, *_difference(to_json(record), to_json(changed))))
                try:
                    record = parse_record(to_json(changed), raw.line)
                except UserError as error:
                    return dropped(raw, "emptied", f"unusable after cleaning: {error}")
        return self._judge(raw, record, tuple(changes))

    def _judge(self, raw: RawRecord, record: Record, changes: tuple) -> Outcome:
        texts = texts_of(record)
        split = SplitTexts(texts)
        n_tokens = (
            sum(map(len, self.tokenizer.encode_batch(texts))) if self.tokenizer and not raw.is_reference else None
        )
        try:
            line = b"" if raw.is_reference else json_line(to_json(record), allow_escapes=False)
        except UnicodeEncodeError:
            return dropped(raw, "unreadable", "the text holds a lone surrogate: it has no UTF-8 form")
        if not raw.is_reference:
            drop = drop_reason(split, n_tokens, self.settings)
            if drop is None and self.questions is not None and (found := self.questions.find(split.units)):
                drop = "contaminated", f"contains an evaluation question: {found[0]!r}, of {found[1]}"
            if drop is not None:
                return dropped(raw, *drop)
        is_compared = self.settings.near_duplicates == "drop"
        return Outcome(
            file_index=raw.file_index,
            line_number=raw.line,
            rule="",
            line=line,
            changes=changes,
            hash=content_hash(record),
            size=self._size(texts, n_tokens),
            is_valid=bool(self.settings.valid_ratio) and self.held_out.takes(record),
            signature=signature(shingle_set(split.units)) if is_compared else None,
        )

    def _size(self, texts: list[str], n_tokens: int | None) -> int:
        """Return the size of a record in the unit of the shares."""
        unit = self.settings.weight_unit
        if unit == "records":
            return 1
        if unit == "tokens":
            return n_tokens or 0
        return sum(len(text if unit == "characters" else text.encode()) for text in texts)


def shingle_set(texts: list[list[str]]) -> set[str]:
    """Return the shingles of a record, given the units of each text: those of all texts, joined."""
    return shingles(list(chain.from_iterable(texts)))


def dropped(raw: RawRecord, rule: str, reason: str) -> Outcome:
    """Return the outcome of a record that a rule drops: the line of the file of dropped records says all of it."""
    entry = {"rule": rule, "reason": reason, "file": raw.file, "line": raw.line}
    entry |= {"record": raw.value} if raw.raw is None else {"raw": raw.raw}
    return Outcome(file_index=raw.file_index, line_number=raw.line, rule=rule, line=json_line(entry), reason=reason)


def json_line(value: dict, *, allow_escapes: bool = True) -> bytes:
    """Return a value as one line of UTF-8 JSON.

    Raises:
        UnicodeEncodeError: a lone surrogate, which has no UTF-8 form, unless ``allow_escapes`` writes it as an escape.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        if not allow_escapes:
            raise
        return json.dumps(value, default=str).encode() + b"\n"


def _difference(before, after) -> tuple[str, str]:
    """Return the first places where two values differ, as text."""
    texts = [json.dumps(value, ensure_ascii=True, default=str) for value in (before, after)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    start = max(0, same - EXCERPT // 4)
    return texts[0][start : start + EXCERPT], texts[1][start : start + EXCERPT]
