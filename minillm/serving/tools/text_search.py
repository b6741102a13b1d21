"""Search in one text file. The model chooses the words and nothing else: neither the file nor a pattern."""

from collections.abc import Callable
from pathlib import Path

from minillm.errors import UserError

MAX_LINES = 10


def search_in(path: str | Path, *, name: str = "search") -> Callable[[str], str]:
    """Return a tool that finds lines of the text file ``path``; the file is read again at every call.

    Args:
        name: of the tool.

    Raises:
        UserError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"cannot search in '{path}': no such file")

    def search(query: str) -> str:
        """Find the lines of a text that contain all words of a query.

        Args:
            query: one or more words.
        """
        words = query.casefold().split()
        if not words:
            raise ValueError("the query is empty: give at least one word")
        with path.open(encoding="utf-8", errors="replace") as lines:
            matches = [line.rstrip("\n") for line in lines if all(word in line.casefold() for word in words)]
        shown = matches[:MAX_LINES]
        if len(matches) > MAX_LINES:
            shown.append(f"({len(matches):,} lines; the first {MAX_LINES} are shown)")
        return "\n".join(shown) or "nothing found"

    search.__name__ = name
    return search
