"""The hash of a data file's content, remembered as long as size, inode and times show that it has not changed."""

import contextlib
import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from minillm.files import sha256

SETTLED_S = 10.0  # a file younger than this might change again within one tick of a coarse clock


def file_hash(path: Path, *, memory: Path | None = None) -> str:
    """Return the SHA-256 (hex) of a file's content.

    Args:
        memory: a directory that stores hashes, so that other ranks and later runs need not read the file again. An
            entry is valid as long as the file's path, size, inode, mtime and ctime are the same. Copying tools and
            editors can set mtime back, but not ctime.
    """
    before = os.stat(path)
    entry = memory and memory / hashlib.sha256(_identity(path, before).encode()).hexdigest()[:32]
    if entry is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(entry.read_text(encoding="utf-8"))
            if stored["file"] == _identity(path, before) and len(stored["sha256"]) == 64:
                return stored["sha256"]
    digest = sha256(path)
    is_settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_S
    if entry is not None and is_settled and _identity(path, os.stat(path)) == _identity(path, before):
        _remember(entry, {"file": _identity(path, before), "sha256": digest})
    return digest


def _identity(path: Path, stat: os.stat_result) -> str:
    return json.dumps([os.path.abspath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])


def _remember(entry: Path, content: dict) -> None:
    partial = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.tmp")
    with contextlib.suppress(OSError):  # if the entry cannot be written, the file is read again next time
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(entry)
