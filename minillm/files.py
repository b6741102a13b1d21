"""Helpers for files: SHA-256 of their content, permissions that follow the user's umask, atomic replacement."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

# Read once, while the program has one thread: a umask can only be read by setting it.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def use_umask(path: Path) -> None:
    """Give ``path`` the usual mode of a new file; safetensors writes files that only their owner can read."""
    os.chmod(path, 0o666 & ~_UMASK)


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Return a context that gives a temporary name next to ``path``, and renames that file to ``path`` at its end.

    After an error the temporary file is gone and ``path`` is as it was. One process at a time may write to ``path``.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically, and make its folder if that is missing."""
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
