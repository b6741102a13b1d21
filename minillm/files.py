"""Helpers for files: SHA-256 of their content, permissions that follow the user's umask, replacement at once."""

import hashlib
import os
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


def replace_text(path: Path, text: str) -> None:
    """Write a text file, and its folder if missing; a process that is killed leaves it whole or as it was."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
