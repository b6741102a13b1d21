"""The raw records of a data file, one after the other, in bounded memory.

    .jsonl            one JSON value per line                          number: the line
    .json             an array of records, one object, or JSON Lines   number: the index in the array, or the line
    .csv, .tsv        a table whose first row names the columns        number: the line where the row begins
    .parquet          one record per row                               number: the row
    .txt              documents instead of records, see below          number: the first line of the document

All formats except ``.parquet`` may be compressed as ``.gz``. A ``.txt`` file is cut at blank lines into documents of
about 4,000 characters. So most paragraphs that belong together stay together, and a file of any size fits in memory.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from minillm.data.sources.encodings import check_encoding, named_errors, open_bytes, open_text, why_not_utf8
from minillm.data.sources.paths import SUFFIXES, data_suffix
from minillm.errors import UserError, missing_package

TXT_DOCUMENT_LEN = 4096  # characters after which the next blank line ends a document
TXT_DOCUMENT_MAX = 65536  # characters after which any line end does; also the longest piece read at once
JSON_CHUNK = 1 << 16  # characters of a .json file read at once
CELL_MAX = 1 << 28  # characters in one cell of a table
UTF8_MARK = b"\xef\xbb\xbf"

# (number, the raw text or value, the parsed value or the UserError that says why there is none)
Raw = tuple[int, object, object]


def check_file(path: str | Path) -> Path:
    """Return ``path`` as a Path; UserError when it is missing, empty, of unknown format, or in UTF-16 or UTF-32."""
    path = Path(path)
    if not path.is_file():
        advice = "it is a directory; name its files" if path.is_dir() else "check the path"
        raise UserError(f"no such data file: {path} ({advice})")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
    with named_errors(path):
        if not path.stat().st_size:
            raise UserError(f"{path} is empty: give a file with at least one record")
        with path.open("rb") as file:
            file.read(1)
        if not path.name.endswith(".parquet"):
            check_encoding(path)
    return path


def read_raw(path: Path) -> Iterator[Raw]:
    """Yield (number, raw, value) of each record of a file; the value of a broken record is a UserError.

    Raises:
        UserError: the rest of the file cannot be read: it is damaged, not UTF-8, or broken between its records.
    """
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    with named_errors(path):
        yield from readers.get(data_suffix(path), _txt)(path)


def _json_lines(path: Path) -> Iterator[Raw]:
    check_encoding(path)
    with open_bytes(path) as file:
        for line, data in enumerate(file, start=1):
            if line == 1:
                data = data.removeprefix(UTF8_MARK)  # some editors put it first
            if data.isspace() or not data:
                continue
            raw = data.decode("utf-8", errors="replace").rstrip("\r\n")
            try:
                value = json.loads(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                value = UserError(why_not_utf8(path, data, error))
            except (ValueError, RecursionError) as error:  # broken JSON, huge numbers, deep nesting
                value = UserError(_json_reason(error))
            if isinstance(value, list) or raw.strip() == "[":
                value = UserError("a list instead of a record: name a file that is one JSON array .json, not .jsonl")
            yield line, raw, value


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}, column {error.colno}"
    return f"broken JSON: {error}"


def _json(path: Path) -> Iterator[Raw]:
    """Yield the records of a ``.json`` file: an array, JSON Lines, or objects that take several lines each."""
    with open_text(path) as file:
        text = _JsonText(file, path)
        if text.peek() == "[":
            yield from _array(text)
            return
    if _first_line_is_json(path):
        yield from _json_lines(path)
        return
    with open_text(path) as file:
        text, number = _JsonText(file, path), 0
        while text.peek():
            number += 1
            value = text.value(number)
            yield number, value, value


def _first_line_is_json(path: Path) -> bool:
    with open_bytes(path) as file:
        first_line = next((line for line in file if line.removeprefix(UTF8_MARK).strip()), b"")
    try:
        json.loads(first_line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _array(text: "_JsonText") -> Iterator[Raw]:
    """Yield the records of an array; ``text`` begins with its ``[``."""
    text.skip()
    number, is_open = 0, text.peek() != "]"
    while is_open:
        number += 1
        value = text.value(number)
        yield number, value, value
        is_open = text.peek() == ","
        if is_open:
            text.skip()
    if text.peek() != "]":
        raise text.broken(number, f"a comma or ] must follow, not {text.peek()!r}" if text.peek() else "it is cut off")
    text.skip()
    if text.peek():
        raise text.broken(number, f"nothing may follow the end of the array, but {text.peek()!r} does")


class _JsonText:
    """The text of a JSON file, read in chunks, so that only the current value is in memory."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        # ``position`` is the next character of ``text``; ``line`` is the line in which ``text`` begins.
        self.text, self.position, self.line = "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def fill(self, n: int) -> bool:
        """Drop the text before ``position`` and append up to n characters; return False at the end of the file."""
        chunk = self.file.read(n)
        self.line += self.text.count("\n", 0, self.position)
        self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)

    def peek(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            white_space = re.compile(r"[ \t\r\n]*").match(self.text, self.position)
            self.position = white_space.end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.fill(JSON_CHUNK):
                return ""

    def skip(self) -> None:
        """Step over the character that ``peek`` returned."""
        self.position += 1

    def value(self, number: int) -> object:
        """Return the JSON value that begins here, the ``number``-th record; UserError if it is broken."""
        self.peek()
        n = JSON_CHUNK
        while True:
            try:
                value, end = self.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # Near the end of the text read so far, or inside a string, the value may only be incomplete.
                is_near_end = error.pos > len(self.text.rstrip()) - 16
                may_be_incomplete = is_near_end or error.msg.startswith("Unterminated string")
                if not (may_be_incomplete and self.fill(n)):
                    self.position = min(error.pos, len(self.text))
                    raise self.broken(number, error.msg) from None
                n *= 2
                continue
            except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
                raise self.broken(number, str(error)) from None
            if end == len(self.text) and self.fill(n):
                continue  # the value may be a number with more digits to come: decode it again
            self.position = end
            return value

    def broken(self, number: int, why: str) -> UserError:
        """Return the error for a file that is broken in or after its ``number``-th record."""
        line = self.line + self.text.count("\n", 0, self.position)
        return UserError(
            f"{self.path}, line {line}: broken JSON in or after record {number} ({why}); correct it there, or save the "
            "records one per line as .jsonl, where a bad line does not stop the others"
        )


def _table(path: Path) -> Iterator[Raw]:
    delimiter = "\t" if data_suffix(path) == ".tsv" else ","
    csv.field_size_limit(CELL_MAX)
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = _column_names(path, next(rows, []))
            line = rows.line_num + 1
            for cells in rows:
                if cells and len(cells) == len(names):
                    value = dict(zip(names, cells, strict=True))
                    yield line, value, value
                elif cells:
                    counts = f"{len(cells)} cells, not {len(names)}; quote cells that hold {delimiter!r}"
                    error = UserError(f"a row of another length than the header: {counts}")
                    yield line, dict(enumerate(cells)), error
                line = rows.line_num + 1
        except csv.Error as error:
            advice = "write cells that hold quotes, commas or line ends between quotes, and double the quotes in them"
            raise UserError(f"{path}, line {rows.line_num}: broken table ({error}); {advice}") from None


def _column_names(path: Path, header: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise UserError(f"{path}: two columns are named {duplicates[0]!r}; rename one of them in the first row")
    if len(names) == 1 and any(separator in names[0] for separator in ";\t|"):
        advice = "separate cells by commas (.csv) or tabs (.tsv)"
        raise UserError(f"{path}: the first row is one cell, {names[0]!r}; {advice}")
    return names


def _parquet(path: Path) -> Iterator[Raw]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("pyarrow", purpose=f"reading {path}", extra="parquet") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row, _without_nulls(row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the last two: invalid texts and dates
        raise UserError(f"{path} is not a readable parquet file ({error})") from None


def _without_nulls(value):
    """Drop keys without a value: a parquet column holds a null where a JSON record has no such key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _txt(path: Path) -> Iterator[Raw]:
    for line, text in _txt_documents(path):
        yield line, text, {"text": text}


def _txt_documents(path: Path) -> Iterator[tuple[int, str]]:
    pieces: list[str] = []
    length = first_line = 0
    line = 1
    with open_text(path) as file:
        while piece := file.readline(TXT_DOCUMENT_MAX):
            if "\x00" in piece:
                raise UserError(f"{path}, line {line}: a NUL character, so this is not plain text; take it out")
            is_blank = piece.isspace()
            if pieces or not is_blank:  # blank lines before a document are dropped
                first_line = first_line if pieces else line
                pieces.append(piece)
                length += len(piece)
            line += piece.endswith("\n")
            if (is_blank and length >= TXT_DOCUMENT_LEN) or length >= TXT_DOCUMENT_MAX:
                yield first_line, "".join(pieces).strip("\r\n")
                pieces, length = [], 0
    if pieces:
        yield first_line, "".join(pieces).strip("\r\n")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for the lines of a UTF-8 text file that are not blank, without their line ends.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    path = Path(path)
    with named_errors(path), open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\n")
