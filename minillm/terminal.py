"""What a terminal can show, asked in one place: colours, and progress bars that move.

Files and pipes get neither escape codes nor carriage returns.
"""

import os
import sys

from tqdm import tqdm

DIM, BLACK_ON_GREEN, RESET = "\x1b[2m", "\x1b[30;42m", "\x1b[0m"


def use_colour(stream=None) -> bool:
    """Return whether escape codes may be written to ``stream`` (default: stdout).

    NO_COLOR forbids them (https://no-color.org), FORCE_COLOR asks for them, TERM=dumb has none; else a terminal has
    them and a file has not. As in Python's own interpreter, NO_COLOR wins.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and (stream or sys.stdout).isatty()


def shows_progress() -> bool:
    """Return whether a progress bar can be shown: where stdout or stderr goes elsewhere, its returns end up there."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(iterable=None, *, enabled: bool = True, **settings) -> tqdm:
    """Return tqdm's bar over ``iterable``; it appears after 2 seconds, on a terminal alone, and leaves nothing.

    Args:
        enabled: False on ranks that show nothing.
        settings: tqdm's own, such as ``total``, ``desc``, ``unit``.
    """
    settings = {"delay": 2, "leave": False, "dynamic_ncols": True} | settings
    return tqdm(iterable, disable=not (enabled and shows_progress()), **settings)
