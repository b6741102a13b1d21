"""``--data_path`` of a preparation: sources, each one or several files, with its share of the output.

zh.jsonl:0.7,en/*.jsonl:0.3        two sources
zh.jsonl,en.jsonl                  one source of two files, no shares
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.data.sources.encodings import named_errors, open_bytes
from minillm.data.sources.paths import SUFFIXES, data_suffix, expand_paths
from minillm.data.sources.raw_records import check_file
from minillm.errors import UserError

_SHARE = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class Source:
    """Files that belong together, and their share of the output (None without shares), all shares adding up to 1."""

    name: str
    files: tuple[Path, ...]
    share: float | None = None


def parse_sources(data_path: str, *, encoding: str = "utf-8") -> list[Source]:
    """Return the sources of ``--data_path``; without shares it is one source.

    Raises:
        UserError: a file that is missing, empty or of an unknown format; shares for some files only; a file twice; no
            file, or only shares of 0.
    """
    parts = [part.strip() for part in data_path.split(",") if part.strip()]
    matches = [_SHARE.fullmatch(part) if not Path(part).exists() else None for part in parts]
    if not any(matches):
        files = tuple(_check(file, encoding) for file in expand_paths(data_path))
        sources = [Source(data_path, files)]
    elif not all(matches):
        without = next(part for part, match in zip(parts, matches, strict=True) if not match)
        raise UserError(f"--data_path: {without} has no share; write {without}:0.5, or give no file a share")
    else:
        total = sum(float(match[2]) for match in matches)
        if not all(float(match[2]) > 0 for match in matches):
            raise UserError(f"--data_path {data_path}: each share must be above 0; leave out files that have none")
        sources = [
            Source(match[1], tuple(_check(file, encoding) for file in expand_paths(match[1])), float(match[2]) / total)
            for match in matches
        ]
    files = [file.resolve() for source in sources for file in source.files]
    if not files:
        raise UserError("no data file given: set --data_path")
    for file in files:
        if files.count(file) > 1:
            raise UserError(f"--data_path names {file} twice; to use it more often, give it a larger share")
    return sources


def convert_to_utf8(path: Path, encoding: str, directory: Path) -> Path:
    """Write a copy of a text file in UTF-8 into ``directory`` and return it; ``.parquet`` has no encoding.

    Raises:
        UserError: bytes that are not text in ``encoding``; the message has their position.
    """
    if data_suffix(path) == ".parquet":
        return path
    directory.mkdir(parents=True)
    copy, position = directory / path.name.removesuffix(".gz"), 0
    decoder = codecs.getincrementaldecoder(encoding)(errors="strict")
    with copy.open("w", encoding="utf-8", newline="") as copied:
        for data in _blocks(path):
            try:
                copied.write(decoder.decode(data, final=not data))
            except UnicodeError as error:
                wrong = position + getattr(error, "start", 0)
                raise UserError(
                    f"{path} is not {encoding} text: wrong bytes near position {wrong:,}; set --encoding to the "
                    "encoding that the file has"
                ) from None
            position += len(data)
    return copy


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, compressed or not, in blocks; the last one is empty."""
    with named_errors(path), open_bytes(path) as file:
        while data := file.read(1 << 20):
            yield data
        yield b""


def _check(path: Path, encoding: str) -> Path:
    """Return ``path``; UserError if it cannot be read. In another encoding than UTF-8, reading will tell."""
    if codecs.lookup(encoding).name == "utf-8" or not path.is_file() or not path.stat().st_size:
        return check_file(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
    return path
