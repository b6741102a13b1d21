"""``RunDirectory``: the directory of a run, which no other run may touch meanwhile."""

import itertools
import os
import re
from pathlib import Path

from minillm.checkpoints import checkpoint
from minillm.checkpoints.lock import lock_directory, writable
from minillm.errors import UserError
from minillm.hub.names import is_adapter, is_model

EARLIER = "earlier"  # with a number: folder of a run directory, for a run that was there before


class RunDirectory:
    """A run's directory. It is locked before the first step and *taken* after it.

    Until then nothing in it changes but the lock, so a run whose start fails leaves an earlier run as it was.
    All methods belong to the main rank.
    """

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"
        self._lock = None
        self.is_taken = False

    def lock(self) -> None:
        """Lock it against other processes; ``UserError`` if one of them has it, or it cannot be written to."""
        self._lock = lock_directory(self.path)

    def check_free(self, *, overwrite: bool, rename_flag: str) -> None:
        """Raise ``UserError`` when it holds a run that the new one would replace without having been told to.

        Args:
            rename_flag: the flag that gives the new run another directory, for the message.
        """
        content = holds_a_run(self.path)
        if content and not overwrite:
            is_finished = content == "a finished run"
            resume = "make it longer (--from_resume --extend)" if is_finished else "resume it (--from_resume)"
            raise UserError(
                f"{self.path} holds {content}: {resume}, start over (--overwrite, which moves it to a folder "
                f"{EARLIER}-1 of that directory), or give the new run another name ({rename_flag} NAME)"
            )

    def take(self, *, is_resumed: bool) -> Path | None:
        """Make the directory this run's: move an earlier run into a folder of it, and return that folder."""
        self.is_taken = True
        with writable(self.path):
            if not is_resumed and holds_a_run(self.path):
                return move_to_earlier(self.path)
        return None

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()


def holds_a_run(directory: Path) -> str | None:
    """Return what a directory holds of an earlier run, in words; None if it is free for a new one."""
    if (directory / f".{EARLIER}.tmp").is_dir():
        return "a run that was about to be moved"
    if is_model(directory) or is_adapter(directory):
        return "a finished run"
    checkpoints = checkpoint.list_checkpoints(directory / "checkpoints")
    return f"an unfinished run with checkpoints up to {checkpoints[0].name}" if checkpoints else None


def is_earlier(path: Path) -> bool:
    """Return whether a path is in a folder of an earlier run, or such a folder."""
    return any(re.fullmatch(rf"{EARLIER}-\d+", part) for part in path.parts)


def move_to_earlier(directory: Path) -> Path:
    """Move the files of an earlier run into a folder of its directory, ``earlier-1`` first; return that folder.

    The lock, names that start with a dot, and folders that no run makes stay. If a kill interrupts the move, the next
    call completes it.
    """
    temporary = directory / f".{EARLIER}.tmp"
    earlier = next(path for n in itertools.count(1) if not (path := directory / f"{EARLIER}-{n}").exists())
    temporary.mkdir(exist_ok=True)
    for path in sorted(directory.iterdir()):
        if not path.name.startswith(".") and (not path.is_dir() or path.name in ("best", "checkpoints")):
            os.rename(path, temporary / path.name)
    os.rename(temporary, earlier)
    checkpoint.remove_leftovers(earlier / "checkpoints")
    return earlier
