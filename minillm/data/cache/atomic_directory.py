"""Atomic directories: complete or absent, even if several processes write the same one at once.

Each process writes to its own directory, ``.<name>.<host>.<pid>.<random>.tmp``, and renames it when it is complete.
Renaming does not replace an existing directory: the first one stays, and the other processes delete their equal
copies. The next process on the same machine deletes what a killed process has left behind.
"""

import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ORPHAN_AGE_S = 24 * 3600  # on Windows, which has no safe way to ask whether a process is alive, only the age counts


def build_directory(final: Path, *, write: Callable[[Path], None], is_complete: Callable[[Path], bool]) -> None:
    """Make the directory ``final``: ``write(directory)`` fills a temporary one, which is then renamed.

    Args:
        is_complete: whether a directory is complete. A complete ``final`` is never replaced, a damaged one is.

    Raises:
        OSError: the disk is full or not writable. Also whatever ``write`` raises. Nothing is left behind then.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(final)
    partial = temporary_path(final)
    try:
        partial.mkdir()
        write(partial)
        while not _rename(partial, final):
            if is_complete(final):
                return  # another process was faster
            _remove_damaged(final, is_complete)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def temporary_path(final: Path) -> Path:
    """Return a name next to ``final`` for this process to write to; ``remove_orphans`` knows such names."""
    return final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def _rename(source: Path, target: Path) -> bool:
    """Rename a directory; return False if ``target`` exists already."""
    try:
        source.rename(target)
    except OSError:  # "directory not empty" on Linux, "file exists" elsewhere
        if not target.exists():
            raise
        return False
    return True


def _remove_damaged(final: Path, is_complete: Callable[[Path], bool]) -> None:
    """Move a damaged directory away and delete it; move it back if another process has completed it meanwhile."""
    moved = temporary_path(final)
    try:
        final.rename(moved)
    except FileNotFoundError:
        return  # another process has moved it
    if is_complete(moved):
        with contextlib.suppress(OSError):  # a third process has made a new one
            moved.rename(final)
    shutil.rmtree(moved, ignore_errors=True)


def remove_orphans(final: Path) -> None:
    """Delete the directories that killed processes of this machine have left behind for ``final``."""
    prefix = f".{final.name}.{socket.gethostname()}."
    for orphan in final.parent.glob(f"{prefix}*.tmp"):
        pid = orphan.name.removeprefix(prefix).partition(".")[0]
        if pid.isdigit() and not _may_be_alive(int(pid), orphan):
            shutil.rmtree(orphan, ignore_errors=True)


def _may_be_alive(pid: int, directory: Path) -> bool:
    """Return whether process ``pid`` of this machine may still be writing to ``directory``."""
    if os.name == "nt":  # os.kill(pid, 0) is Ctrl-C there
        with contextlib.suppress(OSError):
            return time.time() - directory.stat().st_mtime < ORPHAN_AGE_S
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # it belongs to another user; or the number cannot be a process's
    return True
