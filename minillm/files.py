"""Helpers for files: SHA-256 of their content, the user's umask, atomic replacement, the system's errors."""

import contextlib
import hashlib
import os
import re
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


def system_error(error: BaseException | None) -> OSError | None:
    """Return the system's error beneath another one, such as a full disk; None if there is none.

    safetensors writes its number into a text; torch's writer, if it was given an open file, raises another one over it.
    """
    if number := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Return a context for writers of tensors, in which the system's errors are ``OSError``s as of any file."""
    try:
        yield
    except Exception as error:
        beneath = system_error(error)
        if beneath is None or beneath is error:
            raise
        raise beneath from None
