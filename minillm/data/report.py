"""A report on training data, to read before training: ``python -m minillm.data.report``.

How much data is there? How much was rejected or cut? How full are the rows? Are the targets the text that the model
should learn?
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minillm.data.chat import ChatRows
from minillm.data.packing import IGNORE_INDEX, PackedRows
from minillm.data.prepare.exact import HASH, content_hash, first_equal
from minillm.data.records import read_records
from minillm.data.sources.known_names import DEMO_DATA, find_known_data
from minillm.data.sources.rejects import MAX_REJECTED_SHARE
from minillm.data.sources.split import DataFiles
from minillm.data.text import TextRows
from minillm.errors import UserError, script
from minillm.terminal import BLACK_ON_GREEN, DIM, RESET, use_colour
from minillm.tokenizer import load_tokenizer

MAX_SPECIAL_SHARE = 0.05
MAX_TOKEN_SHARE = 0.30
MAX_REASONS = 5  # reasons of rejected records that are shown
TARGET, CONTEXT = BLACK_ON_GREEN, DIM
PLAIN_TARGET = "[[", "]]"  # around targets, without colours
NOT_WRITTEN = "no file, because no directory is writable"


def data_report(rows: PackedRows, tokenizer, *, n_frequent: int = 10) -> dict:
    """Return a report on ``rows``; ``format_report`` turns it into text, ``json.dumps`` can store it.

    Keys: those of ``rows.summary``; ``histogram`` [(from, to, documents)] of document lengths in pairs;
    ``bytes_per_target``; ``special_share``, the share of control tokens among the targets; ``frequent_targets``
    [(token id, text, share)], most frequent first; ``control_texts`` {control token: number of texts that contain its
    name}; ``warnings`` (list of sentences).
    """
    counts = rows.target_counts
    n_targets = max(1, int(counts.sum()))
    special = special_ids(tokenizer)
    special_share = int(sum(counts[i] for i in special if i < len(counts))) / n_targets
    order = np.argsort(-counts, kind="stable")[:n_frequent]
    frequent = [(int(i), token_text(tokenizer, int(i)), int(counts[i]) / n_targets) for i in order if counts[i]]
    report = dict(rows.summary)
    report["max_seq_len"] = rows.max_seq_len
    report["histogram"] = _histogram(np.diff(rows.store.offsets) - 1)
    report["bytes_per_target"] = rows.target_bytes / n_targets
    report["special_share"] = special_share
    report["frequent_targets"] = frequent
    report["control_texts"] = _control_texts(rows, tokenizer) if isinstance(rows, TextRows) else {}
    report["warnings"] = _warnings(report, n_targets)
    return report


def special_ids(tokenizer) -> frozenset[int]:
    """Return the ids of the tokenizer's control tokens, including the one that ends a document."""
    return frozenset(getattr(tokenizer, "special_ids", ())) | {tokenizer.eos_token_id}


def _control_texts(rows: TextRows, tokenizer) -> dict[str, int]:
    """Return the number of texts that contain the name of each control token, such as ``<|im_start|>``."""
    names = sorted((tokenizer.token_bytes(i).decode() for i in special_ids(tokenizer)), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, filter(str.strip, names))))
    counts: dict[str, int] = {}
    for file in rows.files:
        for record in read_records(file, on_reject=lambda *bad: None):
            for name in set(pattern.findall(record.text or "")):
                counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def count_duplicates(source: DataFiles, valid: DataFiles | None = None) -> dict:
    """Return {"duplicates", "leaked"}: the records of ``source`` that equal an earlier one, and one of ``valid``.

    Upper case and white space do not count (``prepare/exact.py``). ``leaked`` is None without ``valid``.
    """
    hashes = _content_hashes(source)
    n_duplicates = int((first_equal(hashes) != np.arange(len(hashes))).sum())
    n_leaked = None
    if valid is not None:
        n_valid = len(held_out := _content_hashes(valid))
        n_leaked = int((first_equal(np.concatenate([held_out, hashes]))[n_valid:] < n_valid).sum())
    return {"duplicates": n_duplicates, "leaked": n_leaked}


def _content_hashes(source: DataFiles) -> np.ndarray:
    """Return the hash, dtype ``HASH``, of each usable record."""
    records = read_records(source.files, on_reject=lambda *bad: None, columns=source.columns)
    return np.fromiter((np.frombuffer(content_hash(record), HASH)[0] for record in records), HASH)


def _duplicate_lines(report: dict) -> list[str]:
    """Return what the report says about duplicates, and their warnings."""
    n_duplicates, n_leaked = report.get("duplicates"), report.get("leaked")
    if n_duplicates is None:
        return []
    lines = [f"duplicates {n_duplicates:,} records equal an earlier one"]
    if n_leaked is not None:
        lines[0] += f", {n_leaked:,} equal one of --valid_path"
    if n_leaked:
        lines.append("WARNING: validation measures what was learned by heart; drop these records: --against of prepare")
    return lines


def _warnings(report: dict, n_targets: int) -> list[str]:
    warnings = []
    if report["control_texts"]:
        names = ", ".join(f"{name} in {n:,}" for name, n in report["control_texts"].items())
        warnings.append(
            f"texts contain the names of control tokens ({names} of {report['documents']:,}): they are encoded as "
            "ordinary text, as several tokens each. Put conversations into a file of messages, for train_sft.py"
        )
    if report["special_share"] > MAX_SPECIAL_SHARE:
        warnings.append(
            f"special tokens are {report['special_share']:.1%} of the targets (usual: below "
            f"{MAX_SPECIAL_SHARE:.0%}). This is normal for short documents and short answers, because each ends with "
            "one. With long ones it means that the model learns control tokens instead of text"
        )
    for token_id, text, share in report["frequent_targets"]:
        if share > MAX_TOKEN_SHARE:
            warnings.append(
                f"token {token_id} {text} is {share:.1%} of the targets (limit {MAX_TOKEN_SHARE:.0%}): "
                "is the data padded, or repeated?"
            )
    if report["rejected"] > 0.01 * report["records"]:
        rejected_files = ", ".join(report["rejected_files"]) or NOT_WRITTEN
        warnings.append(
            f"{report['rejected']:,} of {report['records']:,} records were rejected; reasons: {rejected_files}"
        )
    if report["rejected"] > MAX_REJECTED_SHARE * report["records"]:
        warnings.append(
            f"this is more than {MAX_REJECTED_SHARE:.0%}: training on this data ends with an error, unless you give "
            "--allow_rejected"
        )
    if report["targets_lost"]:
        warnings.append(
            f"{report['cut']:,} of {report['usable']:,} {report['unit']} are cut at --max_seq_len "
            f"{report['max_seq_len']}; {report['targets_lost']:,} targets are lost: raise it to keep them"
        )
    return warnings


def data_lines(summary: dict) -> list[str]:
    """Return a few lines: what was read, what was rejected and why, what was cut, and what is in the rows.

    Args:
        summary: ``PackedRows.summary``.
    """
    unit, n_records = summary["unit"], summary["records"]
    targets_are_tokens = unit not in ("pairs", "replies")
    files = ", ".join(file["path"] for file in summary["files"])
    lines = [f"{n_records:,} records read from {files}"]
    if summary["rejected"]:
        rejected_files = ", ".join(summary["rejected_files"]) or NOT_WRITTEN
        share = summary["rejected"] / n_records
        lines.append(f"{summary['rejected']:,} rejected ({share:.1%}), written to {rejected_files}")
        for reason in summary["reasons"][:MAX_REASONS]:
            lines.append(f"{reason['count']:>9,} x {_short(reason['reason'])} ({reason['first']})")
        other_reasons = summary["reasons"][MAX_REASONS:]
        if other_reasons:
            n_others = sum(reason["count"] for reason in other_reasons)
            lines.append(f"{n_others:>9,} x {len(other_reasons):,} other reasons")
    if summary["targets_lost"]:
        lines.append(f"{summary['cut']:,} cut at --max_seq_len, {summary['targets_lost']:,} targets lost")
    elif summary["cut"]:
        lines.append(f"{summary['cut']:,} longer than a row, cut into several pieces; nothing is lost")
    lines.append(
        f"{summary['usable']:,} {unit}, {summary['pairs']:,} tokens in {summary['rows']:,} rows "
        f"({summary['fill']:.0%} full)" + (f", {summary['targets']:,} of them targets" if targets_are_tokens else "")
    )
    return lines


def _short(reason: str, limit: int = 120) -> str:
    return reason if len(reason) <= limit else reason[: limit - 3] + "..."


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (from, to, number of documents) of bins of document lengths; each bin is twice as wide as the last."""
    n_bits = np.frexp(np.asarray(lengths, np.float64))[1]  # 2^(n_bits - 1) <= length < 2^n_bits
    return [(1 << (bits - 1), (1 << bits) - 1, int(n)) for bits, n in enumerate(np.bincount(n_bits)) if n]


def format_report(report: dict) -> str:
    """Return the report as text for a terminal."""
    lines = [
        f"{file['path']}: {file['records']:,} records, {file['rejected']:,} rejected, "
        f"{file['records'] - file['rejected']:,} {report['unit']}, {file['tokens']:,} tokens"
        for file in report["files"]
        if len(report["files"]) > 1
    ]
    lines += [f"{'' if number else 'data':10} {line}" for number, line in enumerate(data_lines(report))]
    lines += [
        f"targets    {report['bytes_per_target']:.2f} bytes of text each, in rows of up to {report['max_seq_len']:,}",
        f"special    {report['special_share']:.2%} of the targets are control tokens",
        "lengths    (tokens per document, including rejected documents that could be tokenised)",
    ]
    largest_bin = max(n for _, _, n in report["histogram"])
    for low, high, n in report["histogram"]:
        lines.append(f"  {low:>9,} - {high:<9,} {n:>9,} " + "#" * round(40 * n / largest_bin))
    lines.append("most frequent targets")
    lines += [f"  {share:>7.2%}  {text}  ({token_id})" for token_id, text, share in report["frequent_targets"]]
    lines += _duplicate_lines(report)
    lines += [f"WARNING: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def token_text(tokenizer, token_id: int) -> str:
    """Return a token as quoted text, with escapes where its bytes are no text by themselves."""
    return repr(tokenizer.token_bytes(token_id).decode("utf-8", errors="backslashreplace"))


def colour_targets(batch: dict, tokenizer) -> str:
    """Return the first row of ``batch`` as text: targets on green, context dim, one paragraph per document.

    Without colours (``use_colour``) targets are between ``[[`` and ``]]``. The text is in reading order: a token is
    green if the model is trained to predict it.
    """
    columns = {name: np.asarray(batch[name][0]) for name in ("input_ids", "targets", "document_ids")}
    paragraphs = []
    for document in dict.fromkeys(columns["document_ids"].tolist()):
        if document < 0:
            continue
        in_document = columns["document_ids"] == document
        inputs, targets = columns["input_ids"][in_document], columns["targets"][in_document]
        # The first token is never a target. Token t + 1 is target t; where that is masked, it is input t + 1.
        is_target = targets != IGNORE_INDEX
        next_tokens = np.where(is_target, targets, np.append(inputs[1:], -1))
        tokens = [(int(inputs[0]), False)]
        tokens += [(int(i), bool(target)) for i, target in zip(next_tokens, is_target, strict=True) if i >= 0]
        paragraphs.append(_paint(tokens, tokenizer))
    return "\n\n".join(paragraphs)


def _paint(tokens: list[tuple[int, bool]], tokenizer) -> str:
    """Return the text of tokens (id, is target). Tokens of one colour are decoded together, to cut no character."""
    styles = {True: (TARGET, RESET), False: (CONTEXT, RESET)} if use_colour() else {True: PLAIN_TARGET, False: ("", "")}
    painted = []
    for is_target, run in itertools.groupby(tokens, key=lambda token: token[1]):
        text = b"".join(tokenizer.token_bytes(token_id) for token_id, _ in run).decode("utf-8", errors="replace")
        before, after = styles[is_target]
        # Each line has its own escape codes; otherwise terminals extend the background beyond the end of the line.
        painted.append("\n".join(f"{before}{line}{after}" if line else "" for line in text.split("\n")))
    return "".join(painted)


def open_rows(data_path: str | DataFiles, tokenizer, *, kind: str = "auto", **settings) -> PackedRows:
    """Return ``TextRows`` or ``ChatRows`` of the files; with ``kind`` "auto" the first usable record decides."""
    if kind == "auto":
        source = DataFiles.of(data_path)
        records = read_records(source.files[0], on_reject=lambda *bad: None, columns=source.columns)
        first = next(iter(records))
        if first.kind not in ("text", "chat"):
            raise UserError(f"{data_path} holds {first.kind} records; the report reads only texts and conversations")
        kind = first.kind
    return (TextRows if kind == "text" else ChatRows)(data_path, tokenizer, **settings)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Read data files as training would, and print a report."""

    data_path: str = ""
    """Data files, separated by commas; also directories and patterns such as data/*.jsonl (default: the first known
    name in dataset/, else the data of the demo)."""
    valid_path: str = ""
    """Validation files: also count the records that are in them too."""
    columns: str = ""
    """The files' names for our keys: prompt=question,completion=answer."""
    tokenizer_path: str = ""
    """Directory with tokenizer.json (default: out/tokenizer, else out/demo/tokenizer)."""
    kind: Literal["auto", "text", "chat"] = "auto"
    """Kind of the records (auto: that of the first one)."""
    max_seq_len: int = 512
    """Row length in tokens."""
    cache_dir: str = "out/.token_cache"
    """Directory for tokenised data."""
    strict: bool = False
    """Stop at the first bad line, instead of skipping bad lines."""
    json_path: str = ""
    """Also write the report as JSON to this file."""


@script
def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    import tyro

    args = tyro.cli(ReportArguments, prog="python -m minillm.data.report", args=argv, use_underscores=True)
    data_path, tokenizer_path = args.data_path or _known_data(), args.tokenizer_path or _known_tokenizer()
    if not (args.data_path and args.tokenizer_path):
        print(f"data {data_path}, tokenizer {tokenizer_path}")
    tokenizer = load_tokenizer(tokenizer_path)
    settings = {"max_seq_len": args.max_seq_len, "cache_dir": args.cache_dir, "strict": args.strict}
    source = DataFiles(data_path, columns=args.columns)
    report = data_report(open_rows(source, tokenizer, kind=args.kind, **settings), tokenizer)
    valid = DataFiles(args.valid_path, columns=args.columns) if args.valid_path else None
    report |= count_duplicates(source, valid)
    if args.json_path:
        text = json.dumps(report, ensure_ascii=False, indent=1)
        try:
            Path(args.json_path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.json_path}: {error.strerror}; set another --json_path") from None
    print(format_report(report))


def _known_data() -> str:
    """Return the data that train_pretrain.py, or else train_sft.py, would take without --data_path."""
    demo = Path(DEMO_DATA, "pretrain_train.jsonl")
    data = find_known_data("pretrain") or find_known_data("sft") or (str(demo) if demo.is_file() else None)
    if data is None:
        raise UserError("no data in dataset/: give --data_path a file, or run `python dataset/make_demo.py` first")
    return data


def _known_tokenizer() -> str:
    for directory in ("out/tokenizer", "out/demo/tokenizer"):
        if Path(directory, "tokenizer.json").is_file():
            return directory
    raise UserError(
        "no tokenizer in out/ or out/demo/: run `python train_tokenizer.py` first, or give --tokenizer_path a directory"
    )


if __name__ == "__main__":
    main()
