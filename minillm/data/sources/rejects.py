"""Rejected lines of data files: written next to the file with line number and reason, and counted by reason."""

import contextlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from minillm.errors import UserError

MAX_REJECTED_SHARE = 0.1  # a run ends if more of the records are rejected


def reject_line(line: int, reason: str, raw: str | None = None) -> str:
    """Return one line of a ``.rejected.jsonl`` file."""
    entry = {"line": line, "reason": reason} | ({} if raw is None else {"raw": raw})
    # Lone surrogates (legal in JSON escapes) have no UTF-8 form: write them as escapes.
    text = json.dumps(entry, ensure_ascii=False)
    return (text if text.isprintable() else json.dumps(entry)) + "\n"


def reason_kind(reason: str) -> str:
    """Return the part that all reasons of one kind share: the text up to the first colon or semicolon, without values.

    "message 3 has the unknown role 'bot'; allowed: user" becomes "message N has the unknown role …". So reasons can be
    counted by kind.
    """
    without_texts = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"", "…", reason)
    return re.sub(r"\d[\d,.]*", "N", re.split(r"[:;] ", without_texts, maxsplit=1)[0])


def publish_rejected(source: Path, lines: Iterable[str], *, fallback_dir: Path | None) -> Path | None:
    """Write ``<source>.rejected.jsonl`` atomically, or remove an old one when nothing was rejected.

    ``lines`` come from ``reject_line``. If the data's directory is not writable, the file goes to ``fallback_dir``.
    Returns the file's path, or None if no file was written. Several ranks may call it at once.
    """
    lines = list(lines)
    for directory in (source.parent, fallback_dir):
        # Root may write anywhere; even so, a directory without any write permission stays unchanged.
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
        except OSError:  # read-only, or full: try the next directory
            with contextlib.suppress(OSError):
                partial.unlink()
    return None


def count_reasons(lines_by_file: Iterable[tuple[Path, Iterable[str]]]) -> list[dict]:
    """Return ``[{"count", "reason", "first"}]``, the most frequent first.

    Reasons of one kind (``reason_kind``) are counted together: ``reason`` is the text of the first one, ``first`` says
    where it occurred, as "file:line".

    Args:
        lines_by_file: (data file, lines of ``reject_line``).
    """
    reasons: dict[str, dict] = {}
    for file, lines in lines_by_file:
        for line in lines:
            entry = json.loads(line)
            first_entry = {"count": 0, "reason": entry["reason"], "first": f"{file}:{entry['line']}"}
            reasons.setdefault(reason_kind(entry["reason"]), first_entry)["count"] += 1
    return sorted(reasons.values(), key=lambda reason: -reason["count"])


def check_rejected(summary: dict, *, flag: str, allow: bool) -> None:
    """Raise ``UserError`` when more than a tenth of the records were rejected, unless ``allow``.

    Args:
        summary: ``PackedRows.summary``; its ``records``, ``rejected``, ``reasons`` and ``rejected_files`` are used.
        flag: the command line flag that names the files, for the message.
    """
    n_records, n_rejected = summary.get("records", 0), summary.get("rejected", 0)
    if allow or n_rejected <= MAX_REJECTED_SHARE * n_records:
        return
    top_reason, share = summary["reasons"][0], n_rejected / n_records
    rejected_files = ", ".join(summary["rejected_files"]) or "no file (their directory is read-only)"
    raise UserError(
        f"{flag}: {n_rejected:,} of {n_records:,} records ({share:.0%}) were rejected, and the limit is "
        f"{MAX_REJECTED_SHARE:.0%}; most often ({top_reason['count']:,}): {top_reason['reason']} "
        f"({top_reason['first']}); all of them are in {rejected_files}; correct the data, or train on the rest with "
        "--allow_rejected"
    )
