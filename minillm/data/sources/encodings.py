"""Text files in UTF-8, and clear errors for all others.

Text is UTF-8, with or without a byte order mark. A file in another encoding is refused: the message names the encoding
and the command that converts the file. It is never decoded with a guess or with replacement characters.
"""

import codecs
import contextlib
import gzip
import io
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from minillm.data.sources.paths import SUFFIXES
from minillm.errors import UserError


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn errors while reading ``path`` into UserErrors that name the file, and its encoding if it is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}): copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; check its permissions") from None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file, compressed or not, for reading bytes."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")


def open_text(path: Path, *, newline: str | None = None) -> TextIO:
    """Open a file, compressed or not, for reading strict UTF-8 without its byte order mark. Use ``named_errors``."""
    check_encoding(path)
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors="strict", newline=newline)


def check_encoding(path: Path) -> None:
    """Raise UserError when the beginning of a file is UTF-16 or UTF-32, with or without a byte order mark."""
    with open_bytes(path) as file:
        head = file.read(4096)
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is a gzip file: give it a name that ends in .gz, such as {path.name}.gz")
    name = _wide_encoding(head)
    if name:
        raise UserError(f"{path} is {name} text, and UTF-8 is expected: {_conversion_advice(path, name)}")


def _wide_encoding(head: bytes) -> str | None:
    """Return the name of UTF-16 or UTF-32 if the bytes are such text, else None.

    They are if they begin with its byte order mark, or if they have many zero bytes and decode without NUL characters.
    """
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Even Chinese text has a zero byte for every space, line end and punctuation mark of JSON.
    if head.count(0) < max(2, len(head) // 128):
        return None
    for name in ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
        with contextlib.suppress(UnicodeDecodeError):
            text = codecs.getincrementaldecoder(name)().decode(head)
            if text and "\x00" not in text:
                return name
    return None


def guess_encoding(data: bytes) -> str | None:
    """Return the probable encoding of bytes that are not UTF-8: GB18030 or ISO-8859-1; None for damaged UTF-8."""
    text = data.decode("utf-8", errors="replace")
    n_bad = text.count("\ufffd")
    n_good = sum(character >= "\x80" for character in text) - n_bad
    if n_good > n_bad:
        return None
    try:
        codecs.getincrementaldecoder("gb18030")().decode(data)
    except UnicodeDecodeError:
        return "ISO-8859-1"
    # A Chinese character is two high bytes, an accented letter is one.
    runs = re.findall(rb"[\x80-\xff]+", data)
    is_chinese = 2 * sum(len(run) >= 2 for run in runs) >= len(runs)
    return "GB18030" if is_chinese else "ISO-8859-1"


def why_not_utf8(path: Path, data: bytes, error: UnicodeDecodeError) -> str:
    """Return why ``data``, a part of the file, is refused, and the command that converts the file."""
    reason = f"not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start + 1}"
    name = guess_encoding(data)
    if name is None:
        return (
            f"{reason}, although the text around it is UTF-8; download the file again, or drop such bytes: "
            f"{_conversion_advice(path, 'UTF-8')}"
        )
    also_known_as = " (GBK)" if name == "GB18030" else ""
    return f"{reason}, which looks like {name}{also_known_as}; {_conversion_advice(path, name)}"


def _not_utf8(path: Path) -> UserError:
    """Return the error for a file that is not UTF-8, with the line of its first wrong byte."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with open_bytes(path) as file:
        while piece := file.readline(1 << 20):
            pending = decoder.getstate()[0]  # bytes of a character that a long line's last piece has cut
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return UserError(f"{path}, line {line}: {why_not_utf8(path, pending + piece, error)}")
            line += piece.endswith(b"\n")
    return UserError(f"{path}, line {line}: not UTF-8 text: the file ends within a character; download it again")


def _conversion_advice(path: Path, encoding: str) -> str:
    """Return the advice to convert a file, with the command; from UTF-8 the command drops the damaged bytes."""
    longest_first = sorted(SUFFIXES, key=len, reverse=True)
    suffix = next((suffix for suffix in longest_first if path.name.endswith(suffix)), path.suffix)
    new_path = path.with_name(f"{path.name.removesuffix(suffix)}.utf8{suffix}")
    source, target = shlex.quote(str(path)), shlex.quote(str(new_path))
    iconv = f"iconv {'-c ' if encoding == 'UTF-8' else ''}-f {encoding} -t UTF-8"
    if path.name.endswith(".gz"):
        command = f"gzip -dc {source} | {iconv} | gzip > {target}"
    else:
        command = f"{iconv} {source} > {target}"
    advice = f"save it as UTF-8, e.g. with: {command}"
    # Damaged UTF-8 is no other encoding.
    return advice if encoding == "UTF-8" else f"{advice}; minillm.data.prepare --encoding {encoding} reads such files"
