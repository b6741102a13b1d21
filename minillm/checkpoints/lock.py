"""One run per directory: a lock that the system itself takes back when its process ends, however it ends."""

import contextlib
import errno
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from minillm.errors import UserError

FILE = ".lock"
PATIENCE_S = 5.0  # a run that was just killed may take a moment to be gone


def lock_directory(directory: Path, *, patience_s: float = PATIENCE_S) -> IO | None:
    """Make ``directory``; return the open file whose lock says that this process writes there, until it is closed.

    Record locks belong to a process: they end with it, also by SIGKILL, and its workers do not inherit them. Where the
    system or the disk has none (Windows, some network disks), nothing is locked and None is returned.

    Raises:
        UserError: another process has it (the message says which one, on which machine, since when), or the directory
            cannot be made or written to.
    """
    with writable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / FILE, "a+", encoding="utf-8")  # noqa: SIM115 - it stays open as long as the run
        return _lock(file, directory, patience_s)


@contextlib.contextmanager
def writable(directory: Path):
    """Turn an error of the system, while a run's own files are written, into one that names the directory."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {directory}: {error.strerror}; choose another --save_dir"
        ) from error


def _lock(file: IO, directory: Path, patience_s: float) -> IO | None:
    try:
        import fcntl
    except ImportError:
        file.close()
        return None
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                file.close()
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise
            if time.monotonic() > end:
                holder = _holder(file)
                file.close()
                raise UserError(
                    f"{directory} is in use by another run{holder}: wait until it ends, or choose another --save_dir"
                ) from None
            time.sleep(0.1)
    file.seek(0)
    file.truncate()
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
    file.flush()
    return file


def _holder(file: IO) -> str:
    file.seek(0)
    try:
        known = json.loads(file.read())
        return f" (process {known['pid']} on {known['host']}, since {known['since']})"
    except (ValueError, KeyError, TypeError):
        return ""
