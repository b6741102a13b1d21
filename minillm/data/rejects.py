"""Bad lines never vanish: they are kept beside their file, with line number and reason."""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path


def reject_line(line: int, reason: str, raw: str | None = None) -> str:
    """Return one line of a ``.rejected.jsonl`` file."""
    entry = {"line": line, "reason": reason} | ({} if raw is None else {"raw": raw})
    # Lone surrogates (legal in JSON escapes) have no UTF-8 form; escaped they survive.
    text = json.dumps(entry, ensure_ascii=False)
    return (text if text.isprintable() else json.dumps(entry)) + "\n"


def reason_kind(reason: str) -> str:
    """Return what reasons of one kind have in common: the sentence before the first colon or semicolon, without values.

    "message 3 has the unknown role 'bot'; allowed: user" becomes "message N has the unknown role …", so that a
    ``Counter`` of kinds tells how often each thing was wrong.
    """
    without_texts = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"\d[\d,.]*", "N", re.split(r"[:;] ", without_texts, maxsplit=1)[0])


def publish_rejected(source: Path, lines: Iterable[str], *, fallback_dir: Path | None) -> Path | None:
    """Write ``<source>.rejected.jsonl`` whole, or remove a stale one when nothing was rejected.

    ``lines`` are finished lines. Where the data's directory cannot be written, the file goes to
    ``fallback_dir``. Returns the file's path, or None when there is none. Several ranks may call it.
    """
    lines = list(lines)
    for directory in (source.parent, fallback_dir):
        # Root may write anywhere; a directory without a single write bit is still meant to stay as it is.
        if directory is None or not (directory.exists() and directory.stat().st_mode & 0o222):
            continue
        target = directory / (source.name + ".rejected.jsonl")
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            if not lines:
                target.unlink(missing_ok=True)
                continue
            partial.write_text("".join(lines), encoding="utf-8")
            partial.replace(target)
            return target
        except OSError:  # read-only, or full: try the next place
            with contextlib.suppress(OSError):
                partial.unlink()
    return None
