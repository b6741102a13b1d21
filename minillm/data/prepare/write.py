"""The second pass: writes the chosen records, shuffled if asked, and the dropped ones with their reasons.

A shuffle of a file of any size: each record gets a random key. Records are first distributed to some bucket files by
the range of their key, then each bucket, which fits in memory, is sorted and written.
"""

import contextlib
import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minillm.data.prepare.choose import ORDER, Choice, random_keys
from minillm.data.prepare.near import mix_bits
from minillm.data.prepare.one_record import json_line
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.store import RULES, Store

BUCKET_BYTES = 16 << 20  # if no more than MAX_BUCKETS are needed
MAX_BUCKETS = 256  # open files
_HEAD = struct.Struct("<QI")  # key, length of the line


class Output:
    """A file of records: counts them and hashes the bytes while it writes."""

    def __init__(self, path: Path):
        self.path, self.n_records, self.n_bytes = path, 0, 0
        self._digest, self._file = hashlib.sha256(), path.open("wb")

    def write(self, line: bytes) -> None:
        """Append a line."""
        self._file.write(line)
        self._digest.update(line)
        self.n_records += 1
        self.n_bytes += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def describe(self) -> dict:
        """Return records, bytes and hash."""
        return {"records": self.n_records, "bytes": self.n_bytes, "sha256": self._digest.hexdigest()}


def write_outputs(
    store: Store,
    choice: Choice,
    settings: PrepareSettings,
    names: list[str],
    directory: Path,
    work_dir: Path,
    on_drop: Callable[[int, dict], bool],
) -> dict[str, Output]:
    """Write ``train``, ``valid`` and ``dropped`` into ``directory``; return the first two.

    Args:
        names: of the files that records come from.
        work_dir: for temporary files.
        on_drop: called with (file index, entry) for each dropped record; says whether the entry is written.
    """
    is_shuffled = settings.shuffle or bool(choice.mixture)
    with contextlib.ExitStack() as stack:
        train = stack.enter_context(contextlib.closing(Output(directory / "train")))
        valid = stack.enter_context(contextlib.closing(Output(directory / "valid")))
        write_dropped = lambda line: None  # noqa: E731
        if settings.keep_dropped:
            write_dropped = stack.enter_context(_open_gzip(directory / "dropped")).write
        shuffle = _Shuffle(work_dir, store.lines_path.stat().st_size, int(choice.copies.max(initial=1)))
        write_train = shuffle.add if is_shuffled else lambda line, keys: [train.write(line) for _ in keys]
        for line, entry, copy_keys, is_valid in _decided(store, choice, settings, names, on_drop):
            if entry:
                write_dropped(entry)
            elif is_valid:
                valid.write(line)
            else:
                write_train(line, copy_keys)
        for line in shuffle.sorted_lines():
            train.write(line)
    return {"train": train, "valid": valid}


@contextlib.contextmanager
def _open_gzip(path: Path) -> Iterator[BinaryIO]:
    """Open a gzip file whose bytes depend on its content alone: neither on its name nor on the time."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as file:
        yield file


def _decided(store: Store, choice: Choice, settings: PrepareSettings, names: list[str], on_drop: Callable):
    """Yield (line, entry for the dropped file or b"", keys of the copies, is held out) of each record, in order.

    Records that were only not sampled have neither copies nor an entry.
    """
    file_of, line_of, first_rule = store.column("file"), store.column("line_number"), store.column("rule")
    row_of = store.column("row")
    hashes = store.column("hash")
    keys = random_keys(hashes, settings.seed, ORDER)
    alive = 0
    with store.lines_path.open("rb") as lines:
        for row, line in enumerate(lines):
            file_index = int(file_of[row])
            if first_rule[row]:
                is_written = on_drop(file_index, json.loads(line))
                yield line, line if is_written else b"", (), False
                continue
            rule = RULES[choice.rule[alive]]
            if rule and rule != "not_sampled":
                original = choice.duplicate_of[alive]
                original_row = int(row_of[original])
                is_equal = hashes[alive] == hashes[original]
                reason = f"{'equals' if is_equal else 'resembles'} an earlier record"
                if rule == "shared_passage":
                    reason = f"held out, and shares {settings.eval_ngram} words in a row with a training record"
                entry = {
                    "rule": rule,
                    "reason": reason,
                    "file": names[file_index],
                    "line": int(line_of[row]),
                    "duplicate_of": {"file": names[file_of[original_row]], "line": int(line_of[original_row])},
                    "similarity": round(float(choice.similarity[alive]), 4),
                    "record": json.loads(line),
                }
                on_drop(file_index, entry)
                yield line, json_line(entry), (), False
            else:
                n_copies = int(choice.copies[alive])
                copy_keys = mix_bits(keys[alive] ^ np.arange(n_copies, dtype=np.uint64)) if n_copies else ()
                yield line, b"", copy_keys, bool(choice.is_valid[alive])
            alive += 1


class _Shuffle:
    """Sorts lines by their keys through bucket files."""

    def __init__(self, directory: Path, n_bytes: int, max_copies: int):
        self.directory = directory
        self.n_buckets = min(MAX_BUCKETS, 1 + n_bytes * max_copies // BUCKET_BYTES)
        self._files: dict[int, BinaryIO] = {}

    def _path(self, bucket: int) -> Path:
        return self.directory / f"bucket_{bucket}.bin"

    def add(self, line: bytes, keys) -> None:
        """Add a line once for each key."""
        for key in map(int, keys):
            bucket = key * self.n_buckets >> 64
            if bucket not in self._files:
                self._files[bucket] = self._path(bucket).open("wb")
            self._files[bucket].write(_HEAD.pack(key, len(line)) + line)

    def sorted_lines(self) -> Iterator[bytes]:
        """Yield all lines by their key, those with equal keys in the order in which they came."""
        for file in self._files.values():
            file.close()
        for bucket in sorted(self._files):
            data, position, entries = self._path(bucket).read_bytes(), 0, []
            while position < len(data):
                key, length = _HEAD.unpack_from(data, position)
                position += _HEAD.size
                entries.append((key, position, length))
                position += length
            entries.sort(key=lambda entry: entry[0])
            for _, start, length in entries:
                yield data[start : start + length]
            self._path(bucket).unlink()
