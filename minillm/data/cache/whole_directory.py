"""Directories that are whole or absent, however many processes make the same one at the same time.

Each process writes into a directory of its own, ``.<name>.<host>.<pid>.<random>.tmp``, and renames it when it is
complete. Renaming does not replace a directory that is there: the first one stays, and the others drop their equal
copies. What a killed process has left behind is removed by the next one of the same machine.
"""

import contextlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

ORPHAN_AGE_S = 24 * 3600  # Windows cannot ask for a process without a risk: there only the age tells


def build_directory(final: Path, *, write: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Make ``final``: ``write(directory)`` fills a temporary one, which is renamed. A whole one is never replaced.

    Args:
        is_whole: says of a directory whether it is complete; a damaged ``final`` is replaced.

    Raises:
        OSError: the disk is full, or the place cannot be written; whatever ``write`` raises. Nothing is left then.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_orphans(final)
    partial = _temporary(final)
    try:
        partial.mkdir()
        write(partial)
        while not _rename(partial, final):
            if is_whole(final):
                return  # another process was faster
            _set_damaged_aside(final, is_whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def _rename(source: Path, target: Path) -> bool:
    """Rename a directory; return False where there is something at ``target`` already."""
    try:
        source.rename(target)
    except OSError:  # "directory not empty" on Linux, "file exists" elsewhere
        if not target.exists():
            raise
        return False
    return True


def _set_damaged_aside(final: Path, is_whole: Callable[[Path], bool]) -> None:
    """Move a damaged directory away and remove it; what another process made of it meanwhile is moved back."""
    aside = _temporary(final)
    try:
        final.rename(aside)
    except FileNotFoundError:
        return  # another process has moved it
    if is_whole(aside):
        with contextlib.suppress(OSError):  # there is a third one by now
            aside.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_orphans(final: Path) -> None:
    prefix = f".{final.name}.{socket.gethostname()}."
    for orphan in final.parent.glob(f"{prefix}*.tmp"):
        process = orphan.name.removeprefix(prefix).partition(".")[0]
        if process.isdigit() and not _may_be_alive(int(process), orphan):
            shutil.rmtree(orphan, ignore_errors=True)


def _may_be_alive(process: int, directory: Path) -> bool:
    """Return whether a process of this machine may still be writing to ``directory``."""
    if os.name == "nt":  # os.kill(pid, 0) is Ctrl-C there
        with contextlib.suppress(OSError):
            return time.time() - directory.stat().st_mtime < ORPHAN_AGE_S
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # another user's; no process number at all
    return True
