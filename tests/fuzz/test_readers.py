"""Data files of any content: a usable record, a line set aside with its reason, or one clear error; nothing else."""

import csv
import gzip
import io
import json
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minillm.data.cache.tokenise import tokenise_files
from minillm.data.chat import ChatRows
from minillm.data.pairs import JudgedRows, PairRows
from minillm.data.reason_rows import ReasonRows
from minillm.data.records import read_records
from minillm.data.schema import parse_prompt, parse_record
from minillm.data.sources import raw_records
from minillm.data.sources.paths import SUFFIXES
from minillm.data.text import TextRows
from minillm.errors import UserError

from .strategies import (
    RECORDS,
    TIMEOUT_S,
    any_record,
    as_json,
    damaged,
    examples,
    filled,
    mutated,
    outcome,
    sayable,
    scratch,
    values,
)  # fmt: skip

pytestmark = pytest.mark.timeout(TIMEOUT_S)
DEEP = b"[" * 100_000
ROWS = {
    "text": lambda path, tokenizer, **more: TextRows(path, tokenizer, **more),
    "chat": lambda path, tokenizer, **more: ChatRows(path, tokenizer, **more),
    "reason": lambda path, tokenizer, **more: ReasonRows(path, tokenizer, tag_weight=2.0, **more),
    "preference": lambda path, tokenizer, **more: PairRows(path, tokenizer, **more),
    "judged": lambda path, tokenizer, **more: JudgedRows(path, tokenizer, **more),
}

no_newline = st.binary(max_size=30).map(lambda data: data.replace(b"\n", b""))
doubled_keys = st.sampled_from([b'{"text": 1, "text": "second"}', b'{"text": "first", "text": null}'])
good_lines = st.builds(as_json, any_record, ascii=st.booleans())
odd_lines = st.one_of(
    st.builds(as_json, mutated(any_record), ascii=st.booleans()),
    st.builds(as_json, values),
    no_newline,
    doubled_keys,
    good_lines.flatmap(damaged).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([b"", b" \t", b"\xef\xbb\xbf", b"\xff\xfe", DEEP, b'{"text": ' + DEEP]),
    st.just(b'{"text": %s}' % (b"9" * 5000)),
)  # fmt: skip


def numbered(content: bytes) -> list[int]:
    """Return the numbers of the lines that say something, in the slow and obvious way."""
    lines = content.split(b"\n")
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


def begins_as_utf16(error: UserError) -> bool:
    return "UTF-8 is expected" in str(error)


def rejected_of(path) -> list[dict]:
    file = path.with_name(path.name + ".rejected.jsonl")
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


@examples(150)
@given(st.lists(good_lines | odd_lines, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.booleans())
@example([b'{"instruction": 5, "output": "a"}', b'{"text": "x"}'], b"\n", False, False)
@example([b'{"text": "x", "log_prob": ' + b"9" * 400 + b"}"], b"\n", False, False)
def test_every_line_is_taken_or_set_aside(lines, ending, packed, ends_openly):
    content = ending.join(lines) + (b"" if ends_openly else ending)
    with scratch() as folder:
        path = folder / ("data.jsonl.gz" if packed else "data.jsonl")
        path.write_bytes(gzip.compress(content) if packed else content)
        taken = outcome(lambda: [record.line for record in read_records(path)])
        aside = rejected_of(path)
        strict = outcome(lambda: len(list(read_records(path, strict=True))))
    lines_aside = [entry["line"] for entry in aside]
    if isinstance(taken, UserError):
        assert lines_aside == numbered(content) or begins_as_utf16(taken)
        return
    assert sorted(taken + lines_aside) == numbered(content)
    assert all(entry["reason"] for entry in aside)
    assert strict == len(taken) if not aside else isinstance(strict, UserError)


@examples(200)
@given(mutated(any_record))
def test_a_record_is_parsed_or_refused(value):
    record = outcome(parse_record, value, 1)
    if not isinstance(record, UserError):
        assert record.kind in ("text", "chat", "preference", "judged")


@examples(100)
@given(
    st.lists(RECORDS["text"], min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]),
)
def test_texts_come_back_exactly(records, ascii, suffix):
    content = b"".join(as_json(record, ascii=ascii) + b"\n" for record in records)
    with scratch() as folder:
        path = folder / f"data{suffix}"
        if suffix == ".parquet":
            write_parquet(path, records)
        else:
            path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        found = list(read_records(path, strict=True))
    assert [record.text for record in found] == [record["text"] for record in records]
    assert [record.log_prob for record in found] == [record.get("log_prob") for record in records]
    assert [record.extra.get("task") for record in found] == [record.get("task") for record in records]


@examples(100)
@given(any_record)
def test_conversations_come_back_exactly(value):
    record = parse_record(json.loads(as_json(value)), 1)
    for key, messages in (("messages", record.messages), ("chosen", record.chosen)):
        if isinstance(value.get(key), list) and record.kind == "chat":
            assert messages == value[key]
    if isinstance(value.get("prompt"), str):
        assert record.messages == [{"role": "user", "content": value["prompt"]}]
        answer = value.get("completion", value.get("chosen"))
        assert record.chosen == [{"role": "assistant", "content": answer}]


# ---- bytes that nobody wrote -----------------------------------------------------------------------------------


@examples(120)
@given(st.binary(max_size=200), st.sampled_from(SUFFIXES))
@example(b"PAR1", ".parquet")
@example(b"\x1f\x8b\x08\x04", ".jsonl.gz")
def test_random_bytes_end_in_an_error_of_ours(content, suffix):
    with scratch() as folder:
        path = folder / f"data{suffix}"
        path.write_bytes(content)
        error = outcome(lambda: list(read_records(path)))
        assert str(path) in str(error) if isinstance(error, UserError) else error


@examples(100)
@given(st.data(), st.lists(any_record, min_size=1, max_size=4))
def test_a_damaged_gzip_is_named(data, records):
    content = gzip.compress(b"".join(as_json(record) + b"\n" for record in records), mtime=0)
    with scratch() as folder:
        path = folder / "data.jsonl.gz"
        path.write_bytes(data.draw(damaged(content)))
        error = outcome(lambda: list(read_records(path)))
        assert str(path) in str(error) if isinstance(error, UserError) else len(error) <= len(records)


def write_parquet(path, rows) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    names = dict.fromkeys(name for row in rows for name in row)  # its columns are those of the first row
    try:
        table = pyarrow.Table.from_pylist([names | row for row in rows])
        pyarrow.parquet.write_table(table, path)
    except (pyarrow.ArrowException, TypeError, OverflowError, UnicodeError):
        assume(False)  # columns have one type, and some values none at all


@examples(100)
@given(
    st.lists(
        st.sampled_from(sorted(RECORDS)).flatmap(RECORDS.get)
        | mutated(any_record).filter(lambda v: isinstance(v, dict) and v),
        min_size=1,
        max_size=4,
    )
)
def test_every_row_of_a_parquet_file_is_taken_or_set_aside(rows):
    with scratch() as folder:
        path = folder / "data.parquet"
        write_parquet(path, rows)
        taken = outcome(lambda: [record.line for record in read_records(path)])
        aside = [entry["line"] for entry in rejected_of(path)]
    assert sorted(aside + ([] if isinstance(taken, UserError) else taken)) == list(range(1, len(rows) + 1))


@examples(80)
@given(st.data())
def test_a_damaged_parquet_file_is_named(data):
    with scratch() as folder:
        path = folder / "data.parquet"
        write_parquet(path, [{"text": "one 小明", "log_prob": -1.0}, {"text": "two", "log_prob": None}])
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        error = outcome(lambda: list(read_records(path)))
        assert str(path) in str(error) if isinstance(error, UserError) else True


@examples(100)
@given(st.lists(st.text(max_size=40) | st.sampled_from(["\n", "\n\n", "\r\n", " ", "\x1c", "\x00"]), max_size=8))
def test_no_word_of_a_txt_file_is_lost(pieces):
    content = "".join(pieces).encode("utf-8")
    with scratch() as folder, mock.patch.multiple(raw_records, TXT_DOCUMENT_LEN=10, TXT_DOCUMENT_MAX=25):
        path = folder / "data.txt"
        path.write_bytes(content)
        found = outcome(lambda: list(read_records(path)))
    text = content.removeprefix(b"\xef\xbb\xbf").decode()
    if isinstance(found, UserError):
        assert not text.strip() or "\x00" in text
        return
    assert "\x00" not in text
    assert "".join("".join(record.text.split()) for record in found) == "".join(text.split())
    assert [record.line for record in found] == sorted(record.line for record in found)


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
@examples(40)
@given(st.data())
def test_rows_hold_every_usable_line(kind, tokenizer, data):
    good = st.builds(as_json, RECORDS[kind], ascii=st.booleans())
    lines = data.draw(st.lists(good | good | odd_lines, min_size=1, max_size=6))
    max_seq_len = data.draw(st.sampled_from([1, 7, 64, 4096]))
    packing = data.draw(st.sampled_from(["best_fit", "none"]))
    content = b"\n".join(lines)
    with scratch() as folder:
        path = folder / "data.jsonl"
        path.write_bytes(content)
        more = {"max_seq_len": max_seq_len, "packing": packing, "cache_dir": folder / "cache"}
        rows = outcome(ROWS[kind], path, tokenizer, **more)
        if isinstance(rows, UserError):
            return
        for row in range(len(rows)):
            columns = rows[row]
            assert {len(column) for name, column in columns.items() if not name.startswith("other_")} == {
                rows.lengths[row]
            }
        aside = rejected_of(path)
        again = ROWS[kind](path, tokenizer, **more)
        assert again.data_hash == rows.data_hash
        assert again.summary == rows.summary
    assert rows.summary["rejected"] == len(aside)
    per_line = 2 if kind == "preference" else 1
    if kind != "judged":  # there a preference is two answers
        assert rows.summary["documents"] / per_line + len(aside) == len(numbered(content))
        assert len({entry["line"] for entry in aside}) == len(aside)


@examples(60)
@given(
    st.lists(RECORDS["text"], min_size=1, max_size=5),
    st.integers(1, 30),
    st.sampled_from(["stream", "best_fit", "none"]),
)
def test_rows_of_text_hold_every_text(tokenizer, records, max_seq_len, packing):
    eos = tokenizer.eos_token_id
    with scratch() as folder:
        path = folder / "data.jsonl"
        path.write_bytes(b"".join(as_json(record) + b"\n" for record in records))
        rows = TextRows(path, tokenizer, max_seq_len=max_seq_len, packing=packing, cache_dir=folder / "cache")
        targets = [target for row in range(len(rows)) for target in rows[row]["targets"].tolist()]
        store = rows.store
        stored = store.gather("tokens", np.arange(store.n_tokens)).tolist()
        ends = store.offsets.tolist()
    documents = [stored[begin:end] for begin, end in pairwise(ends)]
    assert [tokenizer.decode(ids[1:-1]) for ids in documents] == [record["text"] for record in records]
    assert {ids[0] for ids in documents} | {ids[-1] for ids in documents} == {eos}
    assert sorted(targets) == sorted(token for ids in documents for token in ids[1:])
    assert rows.target_bytes == sum(len(record["text"].encode()) for record in records)


@examples(80)
@given(st.data())
def test_a_damaged_shard_is_made_anew(tokenizer, data):
    with scratch() as folder:
        path = folder / "data.jsonl"
        path.write_bytes(
            b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n[]\n'
        )

        def content():
            (shard,) = tokenise_files(path, tokenizer, kind="chat", cache_dir=folder / "cache")
            columns = [shard.tokens, shard.mask, shard.offsets, shard.lines, shard.bytes, shard.log_prob]
            return shard.path, [column.tolist() for column in columns[:-1]], list(shard.rejected_lines())

        place, *before = content()
        meta = place / "meta.json"
        target = data.draw(st.sampled_from(sorted(place.iterdir())))
        if target == meta:
            whole = json.loads(meta.read_bytes())
            text = data.draw(damaged(meta.read_bytes()) | mutated(st.just(whole)).map(as_json))
            meta.write_bytes(text)
            assume(outcome_of_json(text) != whole)
        elif data.draw(st.booleans()):
            target.unlink()
        else:
            changed = target.read_bytes()
            target.write_bytes(data.draw(st.just(changed[: len(changed) // 2]) | st.just(changed + b"x")))
        assert list(content()) == [place, *before]


def outcome_of_json(text: bytes):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# ---- the same records in every kind of file ----------------------------------------------------------------------


@examples(100)
@given(st.lists(any_record | mutated(any_record), min_size=1, max_size=5), st.integers(1, 40), st.booleans())
def test_an_array_holds_what_its_lines_hold(records, chunk, indented):
    lines = b"\n".join(as_json(record) for record in records)
    array = json.dumps(records, indent=2 if indented else None).encode()
    with scratch() as folder, mock.patch.object(raw_records, "JSON_CHUNK", chunk):
        outcomes = []
        for name, content in (("a.jsonl", lines), ("a.json", array), ("b.json", lines)):
            path = folder / name
            path.write_bytes(content)
            taken = outcome(lambda path=path: list(read_records(path)))
            outcomes.append(
                (taken if isinstance(taken, list) else None, [entry["line"] for entry in rejected_of(path)])
            )
    without_numbers = [([repr(record) for record in taken or []], aside) for taken, aside in outcomes]
    assert without_numbers[0] == without_numbers[1]
    assert without_numbers[0] == without_numbers[2] or len(records) == 1 or not isinstance(records[0], dict)


@examples(100)
@given(
    st.lists(st.tuples(filled, sayable), min_size=1, max_size=4),
    st.sampled_from([".csv", ".tsv", ".csv.gz"]),
    st.booleans(),
)
def test_a_table_gives_back_its_cells(rows, suffix, marked):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
    writer.writerows([("text", "task"), *rows])
    content = file.getvalue().encode("utf-8-sig" if marked else "utf-8")
    with scratch() as folder:
        path = folder / f"a{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        records = list(read_records(path, strict=True))
    assert [(record.text, record.extra["task"]) for record in records] == rows


@examples(150)
@given(mutated(any_record))
def test_a_prompt_is_what_comes_before_the_answer(value):
    record, prompt = outcome(parse_record, value, 1), outcome(parse_prompt, value)
    if isinstance(record, UserError) or isinstance(prompt, UserError):
        return
    if record.kind == "text":
        assert prompt.content == record.text
        return
    whole = record.messages
    asked = whole[:-1] if record.kind == "chat" and whole[-1]["role"] == "assistant" else whole
    assert prompt.content in (asked, asked[0]["content"])
    assert prompt.tools == record.tools
