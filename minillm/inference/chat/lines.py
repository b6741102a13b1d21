"""Reads what a user types: line editing and history in a terminal, and texts of several lines."""

import glob
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from minillm.terminal import BOLD, RESET, use_colour

QUOTES = '"""'
N_HISTORY = 1000  # lines that the history file keeps


def history_path() -> Path:
    """Return the file of the history: ``minillm/chat_history`` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "minillm", "chat_history")


class LineReader:
    """Reads questions from the standard input.

    In a terminal the lines can be edited and completed, and those of earlier chats come back with the arrow keys.
    Elsewhere, and without Python's module ``readline``, lines are read as they are, and nothing is written anywhere.

    Args:
        commands: names that the tab key completes at the beginning of a line; after them it completes paths.
    """

    def __init__(self, commands: Iterable[str]):
        self._commands = sorted(commands)
        self._readline = _readline() if sys.stdin.isatty() and sys.stdout.isatty() else None
        if self._readline:
            self._set_up()

    def read(self) -> tuple[str, bool]:
        """Return the next text, and whether it may be a command; a text in triple quotes is never one.

        A line that ends with a backslash goes on in the next line. A text in triple quotes may have several lines; a
        pasted one too, where the terminal says that it pastes.

        Raises:
            EOFError: the input has ended. KeyboardInterrupt: Ctrl-C. UnicodeDecodeError: a line is not UTF-8.
        """
        print()
        line = self._read_line("> ")
        if line.lstrip().startswith(QUOTES):
            return self._read_quoted(line.lstrip().removeprefix(QUOTES)), False
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._read_line(". "))
        return "\n".join(lines), True

    def _read_quoted(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            try:
                lines.append(self._read_line(". "))
            except EOFError:  # ends the text, as it does in other programs
                return "\n".join(lines).strip("\n")
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str:
        if not self._readline:
            return input(prompt)
        if use_colour():  # \001 and \002 tell readline which characters take no place
            prompt = f"\001{BOLD}\002{prompt}\001{RESET}\002"
        n_before = self._readline.get_current_history_length()
        line = input(prompt)
        self._keep(self._readline.get_current_history_length() - n_before)
        return line

    # ---- readline ------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        self._readline.set_completer(self._complete)
        self._readline.set_completer_delims(" ")
        is_libedit = "libedit" in (self._readline.__doc__ or "")  # on macOS
        self._readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if os.environ.get("TERM") != "dumb":
            self._readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
        self._readline.set_history_length(N_HISTORY)
        self._readline.clear_history()
        try:
            history_path().parent.mkdir(parents=True, exist_ok=True)
            history_path().touch(mode=0o600)
            self._readline.read_history_file(history_path())
        except OSError:  # a chat without a history
            self._keeps_history = False
        else:
            self._keeps_history = hasattr(self._readline, "append_history_file")  # libedit may lack it

    def _keep(self, n_new: int) -> None:
        """Add the newest entries to the file at once: a terminal that is closed ends the program."""
        if n_new > 0 and self._keeps_history:
            try:
                self._readline.append_history_file(n_new, history_path())
            except OSError:
                self._keeps_history = False

    def _complete(self, text: str, state: int) -> str | None:
        line = self._readline.get_line_buffer()
        if not line.startswith("/"):
            return None
        if " " in line:
            paths = glob.glob(glob.escape(os.path.expanduser(text)) + "*")
            matches = sorted(path + os.sep if os.path.isdir(path) else path for path in paths)
        else:
            matches = [f"{command} " for command in self._commands if command.startswith(text)]
        return matches[state] if state < len(matches) else None


def _readline():
    """Return the module ``readline``; None on systems without it, such as Windows."""
    try:
        import readline
    except ImportError:
        return None
    return readline
