"""Every published format in the tables of dataset/README.md and dataset/README_zh.md is read as the table says.

The texts of the records tell what they are: Q a question (or a document), A an answer, B a worse one, S a system
message, R a thought or a tool's result.
"""

import json
import re
from pathlib import Path

import pytest

from minillm.data.records import read_records
from minillm.errors import UserError

DATASET = Path(__file__).parents[2] / "dataset"
ROW = re.compile(r"^\| (\d+) \| `(\{.+\})` \| (?:`--columns (\S+)`)? ?\| (.+) \|$", flags=re.M)
KINDS = {"text": "text", "conversation": "chat", "pair": "preference", "judged answer": "judged"}
KINDS_ZH = {"文本": "text", "对话": "chat", "偏好对": "preference", "单条评判": "judged"}
LETTERS = {"user": "Q", "assistant": "A", "system": "S", "tool": "R"}
LETTER = re.compile(r"\b[QABSR]\d?\b")


def rows_of(page: str) -> dict[int, tuple[dict, str, str]]:
    """Return number: (record, value of --columns, kind in the page's words) of each row of a page."""
    text = (DATASET / page).read_text(encoding="utf-8")
    return {int(number): (json.loads(record), columns, kind) for number, record, columns, kind in ROW.findall(text)}


ROWS = rows_of("README.md")


def write_jsonl(path, record):
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def write_json(path, record):
    path.write_text(json.dumps([record], indent=1), encoding="utf-8")


def write_parquet(path, record):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([record]), path)


def read_one(path, columns: str):
    (record,) = read_records(str(path), columns=columns, strict=True)
    return record


def said(messages: list[dict]) -> set[str]:
    """Return all letters of some messages; AssertionError if one stands under the wrong role."""
    letters = set()
    for message in messages:
        content = LETTER.findall(message.get("content") or "")
        assert all(letter[0] == LETTERS[message["role"]] for letter in content), message
        letters |= {*content, *LETTER.findall(message.get("reasoning_content") or "")}
    return letters


def test_both_pages_have_the_same_formats():
    chinese = rows_of("README_zh.md")
    assert list(ROWS) == list(chinese) == list(range(1, len(ROWS) + 1))
    for number, (record, columns, kind) in ROWS.items():
        assert chinese[number][:2] == (record, columns)
        assert KINDS_ZH[chinese[number][2]] == KINDS[kind]


def test_every_format_that_a_data_set_names_is_there():
    for page in ("README.md", "README_zh.md"):
        text = (DATASET / page).read_text(encoding="utf-8")
        cells = re.findall(r"^\| [^|]*\| [^|]*\| [^|]*\| (\d+(?:[,、] ?\d+)*) \| [^|]* \| [^|]* \|$", text, flags=re.M)
        named = {int(number) for cell in cells for number in re.findall(r"\d+", cell)}
        assert named == set(ROWS), page


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("number", ROWS)
def test_a_record_is_read_without_loss(number, suffix, tmp_path):
    record, columns, kind = ROWS[number]
    path = tmp_path / f"data.{suffix}"
    {"jsonl": write_jsonl, "json": write_json, "parquet": write_parquet}[suffix](path, record)
    read = read_one(path, columns)
    assert read.kind == KINDS[kind]
    if read.kind == "text":
        assert read.text == "Q"
        return
    letters = said(read.messages)
    if read.kind == "preference":
        assert [message["content"] for message in (*read.chosen, *read.rejected)] == ["A", "B"]
        letters |= {"A", "B"}
    if read.kind == "judged":
        assert [message["content"] for message in read.chosen] == ["A"]
        assert read.label is True
        letters |= {"A"}
    assert letters == set(LETTER.findall(json.dumps(record).replace("\\n", "\n")))


def test_what_the_page_says_must_be_converted_is_refused(tmp_path):
    dialogue = "\n\nHuman: Q\n\nAssistant: "
    write_jsonl(tmp_path / "hh.jsonl", {"chosen": dialogue + "A", "rejected": dialogue + "B"})
    with pytest.raises(UserError, match="without a prompt"):
        read_one(tmp_path / "hh.jsonl", "")
