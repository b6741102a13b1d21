"""Data files as people have them: which files a path names, and their raw records, in bounded memory.

    .jsonl            one JSON value per line                     number: the line
    .json             an array of records, one object, or JSON Lines   number: the place in the array, or the line
    .csv, .tsv        a table whose first row names the columns   number: the line where the row begins
    .parquet          one record per row                          number: the row
    .txt              no records: documents, see below            number: the first line of the document

All but ``.parquet`` may be packed as ``.gz``. A ``.txt`` file is cut at blank lines into documents of about 4,000
characters: paragraphs that belong together mostly stay together, and a file of any size is read in bounded memory.

Text is UTF-8, with or without a byte order mark, and nothing else: text in another encoding is refused by name, never
guessed and never read with replacement characters.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from minillm.errors import UserError, missing_package

SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".txt", ".txt.gz",
)  # fmt: skip
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what stands next to data
TXT_DOCUMENT_LEN = 4096  # characters after which the next blank line ends a document
TXT_DOCUMENT_MAX = 65536  # characters after which any line end does (and no line is read beyond that at once)
JSON_CHUNK = 1 << 16  # characters read at once from a .json file
CELL_MAX = 1 << 28  # characters in one cell of a table
UTF8_MARK = b"\xef\xbb\xbf"

# (place in the file, what the file says there as text or value, the value or why there is none)
Raw = tuple[int, object, object]


# ---- which files -----------------------------------------------------------------------------------------


def expand_paths(path: str | Path | list | tuple) -> list[Path]:
    """Return the files that ``path`` names, in order.

    ``path`` is a file, a directory (its data files, sorted by name; not those of directories below it, hidden ones and
    ``.rejected.jsonl``), a pattern such as ``data/*.jsonl`` or ``data/**/*.parquet``, several of these separated by
    commas, or a list of any of them. A file that exists is meant by its name, also where that holds a comma or a
    bracket. A file that does not exist is returned as it is; see ``check_file``.

    Raises:
        UserError: a directory without a data file, or a pattern that matches none.
    """
    if isinstance(path, (list, tuple)):
        return [file for item in path for file in expand_paths(item)]
    if isinstance(path, Path) or os.path.exists(path):
        return _expand_one(str(path))
    parts = str(path).split(",")
    files: list[Path] = []
    while parts:
        n = next((n for n in range(1, len(parts) + 1) if _exists(parts[:n])), 1)
        name = ",".join(parts[:n]).strip()
        files += _expand_one(name) if name else []
        parts = parts[n:]
    return files


def _exists(parts: list[str]) -> bool:
    name = ",".join(parts).strip()
    matches = glob.iglob(name, recursive=True) if glob.has_magic(name) else ()
    return bool(name) and (os.path.exists(name) or any(True for _ in matches))


def _expand_one(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _is_data(file)]
        if not files:
            kinds = f"({', '.join(SUFFIXES)})"
            advice = f"name files, or give a pattern such as {path / '**' / '*.jsonl'}"
            raise UserError(f"{name} is a directory that holds no data file {kinds}: {advice}")
        return files
    if path.exists() or not glob.has_magic(name):
        return [path]
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if _is_data(Path(match))]
    if not files:
        raise UserError(f"{name} matches no data file: check the pattern ({', '.join(SUFFIXES)})")
    return files


def _is_data(file: Path) -> bool:
    name = file.name
    ours = name.startswith(".") or name.endswith(".rejected.jsonl")
    return name.endswith(SUFFIXES) and not ours and name not in NOT_DATA and file.is_file()


def check_file(path: str | Path) -> Path:
    """Return ``path`` as a Path; UserError when it is missing, empty, of no known kind, or begins as UTF-16 does."""
    path = Path(path)
    if not path.is_file():
        what = "it is a directory; name its files" if path.is_dir() else "check the path"
        raise UserError(f"no such data file: {path} ({what})")
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


def data_suffix(path: Path) -> str:
    """Return the suffix that tells how a file is read, ``.gz`` left out: ``.jsonl`` of ``a.b.jsonl.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix


# ---- encodings -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading ``path`` into UserErrors that name it, and its encoding where that is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}): copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, packed or not, for reading bytes."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def open_text(path: Path, *, newline: str | None = None) -> TextIO:
    """Open a file, packed or not, for reading strict UTF-8 without its byte order mark; see ``named_errors``."""
    check_encoding(path)
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="strict", newline=newline)


def check_encoding(path: Path) -> None:
    """Raise UserError when a file begins as UTF-16 or UTF-32 does, with a byte order mark or without."""
    with open_bytes(path) as file:
        head = file.read(4096)
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is a gzip file: give it a name that ends in .gz, such as {path.name}.gz")
    name = _wide_encoding(head)
    if name:
        raise UserError(f"{path} is {name} text, and UTF-8 is expected: {_convert(path, name)}")


def _wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 where the bytes say so: by their mark, or as they read well so and hold zero bytes."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if head.count(0) < max(2, len(head) // 128):  # even Chinese has one per blank, line end or mark of JSON
        return None
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(head)
            if text and "\x00" not in text:
                return name
    return None


def guess_encoding(data: bytes) -> str | None:
    """Return what bytes that are not UTF-8 probably are: GB18030 or ISO-8859-1; None for UTF-8 with damaged spots."""
    text = data.decode("utf-8", errors="replace")
    n_bad = text.count("\ufffd")
    if sum(character >= "\x80" for character in text) - n_bad > n_bad:
        return None
    runs = re.findall(rb"[\x80-\xff]+", data)  # a Chinese character is two such bytes, an accented letter one
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)
        is_chinese = 2 * sum(len(run) >= 2 for run in runs) >= len(runs)
    except UnicodeDecodeError:
        is_chinese = False
    return "GB18030" if is_chinese else "ISO-8859-1"


def why_not_utf8(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    """Return the reason for which ``data``, a piece of the file, is refused, and how to convert the file."""
    name = guess_encoding(data)
    where = f"not UTF-8 text: byte 0x{data[error.start]:02x} at place {error.start + 1}"
    if name is None:
        return f"{where}, among text that is; get the file again, or leave such bytes out: {_convert(path, 'UTF-8')}"
    return f"{where}, which looks like {name}{' (GBK)' if name == 'GB18030' else ''}; {_convert(path, name)}"


def _not_utf8(path: Path) -> UserError:
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open_bytes(path) as file:
        while piece := file.readline(1 << 20):
            pending = decoder.getstate()[0]
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return UserError(f"{path}, line {line}: {why_not_utf8(path, pending + piece, error)}")
            line += piece.endswith(b"\n")
    return UserError(f"{path}, line {line}: not UTF-8 text: the file ends within a character; download it again")


def _convert(path: Path, encoding: str) -> str:
    suffix = next((end for end in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(end)), path.suffix)
    new_path = path.with_name(f"{path.name.removesuffix(suffix)}.utf8{suffix}")
    old, new = shlex.quote(str(path)), shlex.quote(str(new_path))
    convert = f"iconv {'-c ' if encoding == 'UTF-8' else ''}-f {encoding} -t UTF-8"
    packed = path.name.endswith(".gz")
    command = f"gzip -dc {old} | {convert} | gzip > {new}" if packed else f"{convert} {old} > {new}"
    return f"save it as UTF-8, e.g. with: {command}"


# ---- raw records -----------------------------------------------------------------------------------------


def read_raw(path: Path) -> Iterator[Raw]:
    """Yield (number, raw, value) of each record of a file; the value is a UserError where one record is broken.

    Raises:
        UserError: the whole file cannot be read from some place on: damaged, not UTF-8, broken between its records.
    """
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
    with named_errors(path):
        yield from readers.get(data_suffix(path), _txt)(path)


def _json_lines(path: Path) -> Iterator[Raw]:
    check_encoding(path)
    with open_bytes(path) as file:
        for line, data in enumerate(file, start=1):
            if line == 1:
                data = data.removeprefix(UTF8_MARK)  # the mark that some editors put first
            if data.isspace() or not data:
                continue
            raw = data.decode("utf-8", errors="replace").rstrip("\r\n")
            try:
                value = json.loads(data.decode("utf-8"))
            except UnicodeDecodeError as error:
                value = UserError(why_not_utf8(path, data, error))
            except (ValueError, RecursionError) as error:  # broken JSON, absurd numbers, nesting
                value = UserError(_json_reason(error))
            if isinstance(value, list) or raw.strip() == "[":
                value = UserError("a list instead of a record: name a file that is one JSON array .json, not .jsonl")
            yield line, raw, value


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg}, column {error.colno}"
    return f"broken JSON: {error}"


def _json(path: Path) -> Iterator[Raw]:
    with open_text(path) as file:
        text = _JsonText(file, path)
        if text.peek() == "[":
            yield from _array(text)
            return
    with open_bytes(path) as file:
        first = next((line for line in file if line.removeprefix(UTF8_MARK).strip()), b"")
    try:
        json.loads(first.decode("utf-8-sig"))
        is_lines = True
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _json_lines(path)
        return
    with open_text(path) as file:  # one object over several lines, or one such object after the other
        text, number = _JsonText(file, path), 0
        while text.peek():
            number += 1
            value = text.value(number)
            yield number, value, value


def _array(text: "_JsonText") -> Iterator[Raw]:
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
    """The text of a JSON file, of which only the value at hand is in memory."""

    def __init__(self, file: TextIO, path: Path):
        self.file, self.path = file, path
        self.text, self.place, self.line = "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def fill(self, n: int) -> bool:
        """Drop what was read, and append up to n more characters; return False at the end of the file."""
        more = self.file.read(n)
        self.line += self.text.count("\n", 0, self.place)
        self.text, self.place = self.text[self.place :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """Return the next character that is not a blank, "" at the end of the file; it stays to be read."""
        while True:
            rest = re.compile(r"[ \t\r\n]*").match(self.text, self.place)
            self.place = rest.end()
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.fill(JSON_CHUNK):
                return ""

    def skip(self) -> None:
        """Step over the character that ``peek`` returned."""
        self.place += 1

    def value(self, number: int) -> object:
        """Return the JSON value that begins here, the ``number``-th record; UserError where it is broken."""
        self.peek()
        n = JSON_CHUNK
        while True:
            try:
                value, end = self.decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # An error near the end of what was read, or a text that does not end, may be mended by reading on.
                is_at_end = error.pos > len(self.text.rstrip()) - 16
                may_go_on = is_at_end or error.msg.startswith("Unterminated string")
                if not (may_go_on and self.fill(n)):
                    self.place = min(error.pos, len(self.text))
                    raise self.broken(number, error.msg) from None
                n *= 2
                continue
            except (ValueError, RecursionError) as error:  # absurd numbers, nesting
                raise self.broken(number, str(error)) from None
            if end == len(self.text) and self.fill(n):
                continue  # a number may go on behind what was read: once more
            self.place = end
            return value

    def broken(self, number: int, why: str) -> UserError:
        """Return the error for a file that cannot be read on in its ``number``-th record."""
        line = self.line + self.text.count("\n", 0, self.place)
        advice = "mend it there, or save the records one per line as .jsonl, where a bad line does not stop the others"
        return UserError(f"{self.path}, line {line}: broken JSON in or after record {number} ({why}); {advice}")


def _table(path: Path) -> Iterator[Raw]:
    delimiter = "\t" if data_suffix(path) == ".tsv" else ","
    csv.field_size_limit(CELL_MAX)
    with open_text(path, newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = _column_names(path, next(rows, []))
            line = rows.line_num + 1
            for cells in rows:
                if cells:
                    value = dict(zip(names, cells, strict=False))
                    if len(cells) != len(names):
                        counts = f"{len(cells)} cells, not {len(names)}; quote cells that hold {delimiter!r}"
                        value = UserError(f"a row of another length than the header: {counts}")
                    yield line, dict(enumerate(cells)) if isinstance(value, UserError) else value, value
                line = rows.line_num + 1
        except csv.Error as error:
            advice = "put cells that hold quotes, commas or line ends in quotes, and double the quotes in them"
            raise UserError(f"{path}, line {rows.line_num}: broken table ({error}); {advice}") from None


def _column_names(path: Path, header: list[str]) -> list[str]:
    names = [name.strip() for name in header]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{path}: two columns are named {doubled[0]!r}; rename one of them in the first row")
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    if other:
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
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter: a text or date that is none
        raise UserError(f"{path} is not a readable parquet file ({error})") from None


def _without_nulls(value):
    """A parquet column holds a null where a JSON record would lack the key."""
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
            blank = piece.isspace()
            if pieces or not blank:  # blank lines before a document belong to none
                first_line = first_line if pieces else line
                pieces.append(piece)
                length += len(piece)
            line += piece.endswith("\n")
            if (blank and length >= TXT_DOCUMENT_LEN) or length >= TXT_DOCUMENT_MAX:
                yield first_line, "".join(pieces).strip("\r\n")
                pieces, length = [], 0
    if pieces:
        yield first_line, "".join(pieces).strip("\r\n")


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines of a text file that are not blank, without their ends; strict UTF-8.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    path = Path(path)
    with named_errors(path), open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\n")
