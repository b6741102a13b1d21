"""The hash of a data file's bytes, read once: what the file system says of the file tells whether it has changed."""

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
        memory: a folder where hashes are remembered, so that every rank and every later run need not read the file
            again. An entry counts as long as the file's place, size, inode and times of change are the same; the time
            of a change of status (ctime) cannot be set back by copying tools or editors.
    """
    before = os.stat(path)
    entry = memory and memory / hashlib.sha256(_identity(path, before).encode()).hexdigest()[:32]
    if entry is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(entry.read_text(encoding="utf-8"))
            if known["file"] == _identity(path, before) and len(known["sha256"]) == 64:
                return known["sha256"]
    digest = sha256(path)
    is_settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED_S
    if entry is not None and is_settled and _identity(path, os.stat(path)) == _identity(path, before):
        _remember(entry, {"file": _identity(path, before), "sha256": digest})
    return digest


def _identity(path: Path, stat: os.stat_result) -> str:
    return json.dumps([os.path.abspath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])


def _remember(entry: Path, content: dict) -> None:
    partial = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:8]}.tmp")
    with contextlib.suppress(OSError):  # without a memory the file is read again next time
        entry.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(entry)
