"""Bad lines never vanish: they are kept next to their file, with line number and reason, and counted by reason."""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from minillm.errors import UserError

MAX_REJECTED_SHARE = 0.1  # of the records, above which a run ends


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


def count_reasons(lines_by_file: Iterable[tuple[Path, Iterable[str]]]) -> list[dict]:
    """Return ``[{"count", "reason", "first"}]``, the most frequent first.

    Reasons of one kind (``reason_kind``) count as one; ``reason`` is the text of the first of them, which stands at
    ``first``, "file:line".

    Args:
        lines_by_file: (data file, finished lines of ``reject_line``).
    """
    reasons: dict[str, dict] = {}
    for file, lines in lines_by_file:
        for line in lines:
            entry = json.loads(line)
            example = {"count": 0, "reason": entry["reason"], "first": f"{file}:{entry['line']}"}
            known = reasons.setdefault(reason_kind(entry["reason"]), example)
            known["count"] += 1
    return sorted(reasons.values(), key=lambda reason: -reason["count"])


def check_rejected(summary: dict, *, flag: str, allow: bool) -> None:
    """Raise ``UserError`` when more than a tenth of the records of a file were rejected, unless ``allow``.

    Args:
        summary: of the rows (``PackedRows.summary``), with ``records``, ``rejected``, ``reasons``, ``rejected_files``.
        flag: that names the files, for the message.
    """
    n_records, n_rejected = summary.get("records", 0), summary.get("rejected", 0)
    if allow or n_rejected <= MAX_REJECTED_SHARE * n_records:
        return
    most, share = summary["reasons"][0], n_rejected / n_records
    where = ", ".join(summary["rejected_files"]) or "no file: their directory is read-only"
    raise UserError(
        f"{flag}: {n_rejected:,} of {n_records:,} records ({share:.0%}) were rejected, and the limit is "
        f"{MAX_REJECTED_SHARE:.0%}; most often ({most['count']:,}): {most['reason']} ({most['first']}); all of them "
        f"are in {where}; mend the data, or train on the rest with --allow_rejected"
    )
