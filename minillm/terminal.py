"""Colours and progress bars, only where the output is a terminal.

Files and pipes get neither escape codes nor carriage returns.
"""

import os
import sys

from tqdm import tqdm

BOLD, DIM, BLACK_ON_GREEN, RESET = "\x1b[1m", "\x1b[2m", "\x1b[30;42m", "\x1b[0m"
ERASE_LINE = "\r\x1b[K"


def use_colour(stream=None) -> bool:
    """Return whether escape codes may be written to ``stream`` (default: stdout).

    NO_COLOR disables them (https://no-color.org), FORCE_COLOR enables them, TERM=dumb has none; otherwise terminals
    have them and files do not. As in Python's own interpreter, NO_COLOR has precedence.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and (stream or sys.stdout).isatty()


def dim(text: str) -> str:
    """Return ``text``, dimmed if stdout has colours."""
    return f"{DIM}{text}{RESET}" if use_colour() else text


def shows_progress() -> bool:
    """Return whether a progress bar can be shown: both stdout and stderr must be terminals."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(iterable=None, *, enabled: bool = True, **settings) -> tqdm:
    """Return tqdm's bar over ``iterable``. It appears after 2 seconds, only in a terminal, and is removed at the end.

    Args:
        enabled: False on ranks that show no bar.
        settings: of tqdm, such as ``total``, ``desc``, ``unit``.
    """
    settings = {"delay": 2, "leave": False, "dynamic_ncols": True} | settings
    return tqdm(iterable, disable=not (enabled and shows_progress()), **settings)
