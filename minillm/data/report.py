"""What is in the data, before any time is spent on training: ``python -m minillm.data.report``.

It answers the questions that cost most when asked late: how much is there, how much was set aside or cut,
how full are the rows, and is what the model is asked to predict really the text one meant?
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minillm.data.cache.shards import split_paths
from minillm.data.chat import ChatRows
from minillm.data.packing import IGNORE_INDEX, PackedRows
from minillm.data.schema import read_records
from minillm.data.sources.known_names import DEMO_DATA, find_known_data
from minillm.data.sources.rejects import MAX_REJECTED_SHARE
from minillm.data.sources.split import DataFiles
from minillm.data.text import TextRows
from minillm.errors import UserError, script
from minillm.terminal import BLACK_ON_GREEN, DIM, RESET, use_colour
from minillm.tokenizer import load_tokenizer

MAX_SPECIAL_SHARE = 0.05
MAX_TOKEN_SHARE = 0.30
MAX_REASONS = 5  # of rejected records, that are shown
TARGET, CONTEXT = BLACK_ON_GREEN, DIM
PLAIN_TARGET = "[[", "]]"  # where there are no colours


def data_report(rows: PackedRows, tokenizer, *, n_frequent: int = 10) -> dict:
    """Return what is known about ``rows``; ``format_report`` prints it, ``json.dumps`` stores it.

    Keys: those of ``rows.summary``; ``histogram`` [(from, to, documents)] of document lengths in pairs;
    ``bytes_per_target``; ``special_share`` of control tokens among targets; ``frequent_targets`` [(token id,
    text, share)], most frequent first; ``control_texts`` {control token: how many texts hold its name as text};
    ``warnings`` (list of sentences).
    """
    counts = rows.target_counts
    n_targets = max(1, int(counts.sum()))
    special = special_ids(tokenizer)
    special_share = int(sum(counts[i] for i in special if i < len(counts))) / n_targets
    order = np.argsort(-counts, kind="stable")[:n_frequent]
    frequent = [(int(i), _shown(tokenizer, int(i)), int(counts[i]) / n_targets) for i in order if counts[i]]
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
    """Return the ids of control tokens: those of the tokenizer, at least the one that ends a document."""
    return frozenset(getattr(tokenizer, "special_ids", ())) | {tokenizer.eos_token_id}


def _control_texts(rows: TextRows, tokenizer) -> dict[str, int]:
    """Return how many texts hold the name of each control token, such as ``<|im_start|>``; none are left out."""
    names = sorted((tokenizer.token_bytes(i).decode() for i in special_ids(tokenizer)), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, filter(str.strip, names))))
    counts: dict[str, int] = {}
    for file in rows.files:
        for record in read_records(file, on_reject=lambda *bad: None):
            for name in set(pattern.findall(record.text or "")):
                counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _warnings(report: dict, n_targets: int) -> list[str]:
    warnings = []
    if report["control_texts"]:
        names = ", ".join(f"{name} in {n:,}" for name, n in report["control_texts"].items())
        warnings.append(
            f"texts hold the names of control tokens ({names} of {report['documents']:,}): they are read as ordinary "
            "text, of several tokens each. Conversations belong into a file of messages, for train_sft.py"
        )
    if report["special_share"] > MAX_SPECIAL_SHARE:
        warnings.append(
            f"special tokens are {report['special_share']:.1%} of the targets (usual: under "
            f"{MAX_SPECIAL_SHARE:.0%}). Short documents and short answers do this rightly, since each ends with "
            "one; with long ones it means that markers are learned instead of text"
        )
    for token_id, text, share in report["frequent_targets"]:
        if share > MAX_TOKEN_SHARE:
            warnings.append(
                f"token {token_id} {text} is {share:.1%} of the targets (limit {MAX_TOKEN_SHARE:.0%}): "
                "is the data padded, or repeated?"
            )
    if report["rejected"] > 0.01 * report["records"]:
        places = ", ".join(report["rejected_files"]) or "no place to write them was found"
        warnings.append(f"{report['rejected']:,} of {report['records']:,} records were rejected; reasons: {places}")
    if report["rejected"] > MAX_REJECTED_SHARE * report["records"]:
        warnings.append(
            f"that is more than {MAX_REJECTED_SHARE:.0%}: training on this data ends with an error, unless "
            "--allow_rejected is given"
        )
    if report["targets_lost"]:
        warnings.append(
            f"{report['cut']:,} of {report['usable']:,} {report['unit']} are cut at --max_seq_len "
            f"{report['max_seq_len']}; {report['targets_lost']:,} targets are lost: raise it to keep them"
        )
    return warnings


def data_lines(summary: dict) -> list[str]:
    """Return in a few lines what was read, what was rejected and why, what is cut, and what is in the rows.

    Args:
        summary: of the rows (``PackedRows.summary``).
    """
    unit, n_records = summary["unit"], summary["records"]
    counts_tokens = unit not in ("pairs", "replies")  # which are themselves what the loss counts
    files = ", ".join(file["path"] for file in summary["files"])
    lines = [f"{n_records:,} records read from {files}"]
    if summary["rejected"]:
        where = ", ".join(summary["rejected_files"]) or "no place to write them was found"
        lines.append(f"{summary['rejected']:,} rejected ({summary['rejected'] / n_records:.1%}), kept in {where}")
        shown, others = summary["reasons"][:MAX_REASONS], summary["reasons"][MAX_REASONS:]
        lines += [f"{each['count']:>9,} x {_short(each['reason'])} ({each['first']})" for each in shown]
        if others:
            lines.append(f"{sum(reason['count'] for reason in others):>9,} x {len(others):,} other reasons")
    if summary["targets_lost"]:
        lines.append(f"{summary['cut']:,} cut at --max_seq_len, {summary['targets_lost']:,} targets lost")
    elif summary["cut"]:
        lines.append(f"{summary['cut']:,} longer than a row, and cut into several; nothing is lost")
    lines.append(
        f"{summary['usable']:,} {unit}, {summary['pairs']:,} tokens in {summary['rows']:,} rows "
        f"({summary['fill']:.0%} full)" + (f", {summary['targets']:,} of them targets" if counts_tokens else "")
    )
    return lines


def _short(reason: str, limit: int = 120) -> str:
    return reason if len(reason) <= limit else reason[: limit - 3] + "..."


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length; each bin is twice as wide as the one before."""
    bits = np.frexp(np.asarray(lengths, np.float64))[1]  # 2^(bits - 1) <= length < 2^bits
    numbers = np.bincount(bits)
    return [(1 << (b - 1), (1 << b) - 1, int(n)) for b, n in enumerate(numbers) if n]


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
        "lengths    (tokens per document, rejected ones that could be read included)",
    ]
    most = max(n for _, _, n in report["histogram"])
    for low, high, n in report["histogram"]:
        lines.append(f"  {low:>9,} - {high:<9,} {n:>9,} " + "#" * round(40 * n / most))
    lines.append("most frequent targets")
    lines += [f"  {share:>7.2%}  {text}  ({token_id})" for token_id, text, share in report["frequent_targets"]]
    lines += [f"WARNING: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _shown(tokenizer, token_id: int) -> str:
    return repr(tokenizer.token_bytes(token_id).decode("utf-8", errors="backslashreplace"))


def colour_targets(batch: dict, tokenizer) -> str:
    """Return the first row of ``batch`` as text: targets on green, context dim, one paragraph per document.

    Where no colours are to be written (``use_colour``), targets stand between ``[[`` and ``]]``. Every token stands
    where it is read, so a token is green when predicting it is learned.
    """
    columns = {name: np.asarray(batch[name][0]) for name in ("input_ids", "targets", "document_ids")}
    paragraphs = []
    for document in dict.fromkeys(columns["document_ids"].tolist()):
        if document < 0:
            continue
        here = columns["document_ids"] == document
        inputs, targets = columns["input_ids"][here], columns["targets"][here]
        # The first token is nobody's target; token t + 1 is target t, learned or not.
        following = np.where(targets != IGNORE_INDEX, targets, np.append(inputs[1:], -1))
        tokens = [(int(inputs[0]), False)]
        tokens += [(int(i), bool(t != IGNORE_INDEX)) for i, t in zip(following, targets, strict=True) if i >= 0]
        paragraphs.append(_paint(tokens, tokenizer))
    return "\n\n".join(paragraphs)


def _paint(tokens: list[tuple[int, bool]], tokenizer) -> str:
    """Tokens of one colour are decoded together, so that no character is halved within them."""
    painted, run, colour = [], b"", None
    styles = {True: (TARGET, RESET), False: (CONTEXT, RESET)} if use_colour() else {True: PLAIN_TARGET, False: ("", "")}
    for token_id, is_target in [*tokens, (None, None)]:
        if is_target != colour and run:
            text = run.decode("utf-8", errors="replace")
            # Colour line by line: terminals carry a background over the line's end otherwise.
            before, after = styles[colour]
            painted.append("\n".join(f"{before}{line}{after}" if line else "" for line in text.split("\n")))
            run = b""
        colour = is_target
        run += b"" if token_id is None else tokenizer.token_bytes(token_id)
    return "".join(painted)


def open_rows(data_path: str | DataFiles, tokenizer, *, kind: str = "auto", **settings) -> PackedRows:
    """Return ``TextRows`` or ``ChatRows`` of the files, as ``kind`` says; "auto" asks the first usable record."""
    if kind == "auto":
        source = DataFiles.of(data_path)
        records = read_records(split_paths(source)[0], on_reject=lambda *bad: None, columns=source.columns)
        first = next(iter(records))
        if first.kind not in ("text", "chat"):
            raise UserError(f"{data_path} holds {first.kind} records; the report reads text and conversations")
        kind = first.kind
    return (TextRows if kind == "text" else ChatRows)(data_path, tokenizer, **settings)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Read data files as training would, and print what is in them."""

    data_path: str = ""
    """Data files, separated by commas; directories and patterns (data/*.jsonl) too (default: the first known name in
    dataset/, else the demo world's)."""
    columns: str = ""
    """The files' names for our keys: prompt=question,completion=answer."""
    tokenizer_path: str = ""
    """Directory with tokenizer.json (default: out/tokenizer, else out/demo/tokenizer)."""
    kind: Literal["auto", "text", "chat"] = "auto"
    """What the records are (auto: asked of the first one)."""
    max_seq_len: int = 512
    """Row length in tokens."""
    cache_dir: str = "out/.token_cache"
    """Where tokenised data is kept."""
    strict: bool = False
    """Refuse files that hold a bad line."""
    json_path: str = ""
    """Write the report there as JSON, too."""


@script
def main(argv: list[str] | None = None) -> None:
    """Print the report that the command line asks for; a UserError is one line on stderr and exit code 2."""
    import tyro

    args = tyro.cli(ReportArguments, prog="python -m minillm.data.report", args=argv, use_underscores=True)
    data_path, tokenizer_path = args.data_path or _known_data(), args.tokenizer_path or _known_tokenizer()
    if not (args.data_path and args.tokenizer_path):
        print(f"data {data_path}, tokenizer {tokenizer_path}")
    tokenizer = load_tokenizer(tokenizer_path)
    settings = {"max_seq_len": args.max_seq_len, "cache_dir": args.cache_dir, "strict": args.strict}
    source = DataFiles(data_path, columns=args.columns)
    report = data_report(open_rows(source, tokenizer, kind=args.kind, **settings), tokenizer)
    if args.json_path:
        text = json.dumps(report, ensure_ascii=False, indent=1)
        try:
            Path(args.json_path).write_text(text, encoding="utf-8")
        except OSError as error:
            reason = f"cannot write {args.json_path}: {error.strerror}; set another --json_path"
            raise UserError(reason) from None
    print(format_report(report))


def _known_data() -> str:
    """Return the data that a bare train_pretrain.py, or else train_sft.py, would take."""
    demo = Path(DEMO_DATA, "pretrain_train.jsonl")
    data = find_known_data("pretrain") or find_known_data("sft") or (str(demo) if demo.is_file() else None)
    if data is None:
        raise UserError("no data in dataset/: give --data_path a file, or run `python dataset/make_demo.py` first")
    return data


def _known_tokenizer() -> str:
    for directory in ("out/tokenizer", "out/demo/tokenizer"):
        if Path(directory, "tokenizer.json").is_file():
            return directory
    raise UserError("no tokenizer in out/ or out/demo/: run `python train_tokenizer.py` first, or give one")


if __name__ == "__main__":
    main()
