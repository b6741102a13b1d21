"""Reads data files: their usable records in order, and what to do with the bad ones."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from minillm.data.schema import Prompt, Record, parse_prompt, parse_record
from minillm.data.sources.columns import ANSWERS, QUESTIONS, parse_columns, rename_columns
from minillm.data.sources.paths import data_suffix, expand_paths
from minillm.data.sources.raw_records import check_file, read_lines, read_raw
from minillm.data.sources.rejects import publish_rejected, reject_line
from minillm.errors import UserError

TABLES = (".csv", ".tsv")
FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # how tables write labels


def read_records(
    path: str | Path | list,
    *,
    strict: bool = False,
    on_reject: Callable[[int, str, str], None] | None = None,
    columns: str = "",
) -> Iterator[Record]:
    """Return an iterator over the usable records of one or several files, in order, in bounded memory.

    Args:
        path: whatever ``expand_paths`` takes.
        strict: raise a ``UserError`` for the first bad line, instead of skipping bad lines.
        on_reject: called with (line, reason, raw text) for each bad line. By default bad lines are written to
            ``<path>.rejected.jsonl`` at the end of the file.
        columns: the file's names for our keys, such as ``prompt=question,completion=answer``.

    Raises:
        UserError: at once for a file that is missing, empty or of an unknown format; at the end of a file without a
            usable record.
    """
    files = [check_file(file) for file in expand_paths(path)]
    if not files:
        raise UserError("no data file given: name at least one")
    file_names = parse_columns(columns)
    if on_reject is None:
        return (record for file in files for record in _read_and_publish(file, strict, file_names))
    return (record for file in files for record in _read(file, strict, on_reject, file_names))


def read_prompts(path: str | Path, *, columns: str = "") -> list[Prompt]:
    """Return the prompts of a file with the answers that it expects, "" where it names none.

    In a file of records, each record without its last answer is a prompt (``parse_prompt``); of preferences the chosen
    reply is expected. In any other file (``.txt``, ``.md``, no suffix) each line that is not blank is a prompt.

    Raises:
        UserError: the file cannot be read, holds no prompt, or has a bad record.
    """
    prompts: list[Prompt] = []
    file_names = parse_columns(columns)
    for file in expand_paths(path):
        if data_suffix(file) not in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
            prompts += [Prompt(content=line) for _, line in read_lines(file)]
            continue
        for line, _, value in read_raw(check_file(file)):
            try:
                value = with_our_names(value, file_names, data_suffix(file) in TABLES)
                prompts.append(replace(parse_prompt(value), expected=_expected_answer(value, line)))
            except UserError as error:
                raise UserError(f"{file}, line {line}: {error}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one per line")
    return prompts


def _expected_answer(value: object, line: int) -> str:
    try:
        record = parse_record(value, line)
    except UserError:  # a question without an answer is a prompt too
        return ""
    turns = record.chosen if record.kind == "preference" else record.messages
    return turns[-1].get("content") or "" if turns and turns[-1]["role"] == "assistant" else ""


def _read_and_publish(path: Path, strict: bool, columns: dict[str, str]) -> Iterator[Record]:
    """Yield a file's usable records; at its end, write the bad lines to ``<path>.rejected.jsonl``."""
    rejected_lines: list[str] = []
    is_finished = False  # a caller that stops early has seen only some of the bad lines: do not write them
    try:
        yield from _read(path, strict, lambda *bad_line: rejected_lines.append(reject_line(*bad_line)), columns)
        is_finished = True
    except UserError:  # no usable record, or a strict reader, which has rejected nothing
        is_finished = True
        raise
    finally:
        if is_finished and rejected_lines:
            rejected_path = publish_rejected(path, rejected_lines, fallback_dir=None)
            see = f"see {rejected_path}" if rejected_path else "not written: the directory is read-only"
            print(f"{path}: {len(rejected_lines)} bad lines, {see}", file=sys.stderr)


def _read(path: Path, strict: bool, on_reject: Callable, columns: dict[str, str]) -> Iterator[Record]:
    n_usable = n_rejected = 0
    first_reason = ""
    is_table = data_suffix(path) in TABLES
    for line, raw, value in read_raw(path):
        try:
            record = parse_record(with_our_names(value, columns, is_table), line)
        except UserError as error:
            if strict:
                raise UserError(f"{path}, line {line}: {error}") from None
            first_reason = first_reason or f"line {line}: {error}"
            n_rejected += 1
            raw = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
            on_reject(line, str(error), raw)
            continue
        n_usable += 1
        yield record
    if not n_usable and n_rejected:
        raise UserError(f"{path} has no usable record: all {n_rejected} lines are bad; the first, {first_reason}")
    if not n_usable:
        raise UserError(f"{path} is empty: give a file with at least one record")


def with_our_names(value: object, columns: dict[str, str], is_table: bool) -> object:
    """Return a raw record under our names, with the cells of a table converted to values.

    Raises:
        UserError: ``value`` itself, if it is one: the record is broken.
    """
    if isinstance(value, UserError):
        raise value
    if isinstance(value, dict):
        value = rename_columns(value, columns)
        if is_table:
            value = {key: _cell_value(key, item) for key, item in value.items()}
    return value


def _cell_value(key: str, text: str):
    """Return what the cell of a table means: a label, a number, turns written as JSON, or the text itself."""
    if key in ("label", "kto_tag"):
        return FLAGS.get(text.strip().lower(), text)
    if key in ("log_prob", "weight"):
        try:
            return float(text) if text.strip() else None
        except ValueError:
            return text
    if key in ("chosen", "rejected", *QUESTIONS, *ANSWERS) and text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        turns = value if isinstance(value, list) else [value]
        if turns and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
            return value
    return text
