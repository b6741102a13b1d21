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

from minillm.data.chat import ChatRows
from minillm.data.known_names import DEMO_DATA, find_known_data
from minillm.data.packing import IGNORE_INDEX, PackedRows
from minillm.data.schema import read_records
from minillm.data.shards import split_paths
from minillm.data.text import TextRows
from minillm.errors import UserError, script
from minillm.tokenizer import load_tokenizer

MAX_SPECIAL_SHARE = 0.05
MAX_TOKEN_SHARE = 0.30
TARGET, CONTEXT, RESET = "\x1b[30;42m", "\x1b[2m", "\x1b[0m"  # black on green; dim


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
    """Return the ids of control tokens: those of the tokenizer, at least <|endoftext|>."""
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
    total = report["documents"] + report["rejected"]
    if report["rejected"] > 0.01 * total:
        places = ", ".join(report["rejected_files"]) or "no place to write them was found"
        warnings.append(f"{report['rejected']} of {total} records were rejected; reasons: {places}")
    if report["targets_lost"]:
        warnings.append(
            f"{report['cut']} of {report['documents']} conversations are cut at --max_seq_len "
            f"{report['max_seq_len']}; {report['targets_lost']:,} targets are lost: raise it to keep them"
        )
    return warnings


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Documents by length; each bin is twice as wide as the one before."""
    bits = np.frexp(np.asarray(lengths, np.float64))[1]  # 2^(bits - 1) <= length < 2^bits
    numbers = np.bincount(bits)
    return [(1 << (b - 1), (1 << b) - 1, int(n)) for b, n in enumerate(numbers) if n]


def format_report(report: dict) -> str:
    """Return the report as text for a terminal."""
    lines = [f"{file['path']}: {file['documents']:,} documents, {file['tokens']:,} tokens" for file in report["files"]]
    lines += [
        f"rows       {report['rows']:,} of up to {report['max_seq_len']:,}, {report['fill']:.1%} full",
        f"targets    {report['targets']:,} of {report['pairs']:,} positions, "
        f"{report['bytes_per_target']:.2f} bytes of text each",
        f"rejected   {report['rejected']:,} records" + "".join(f", see {p}" for p in report["rejected_files"]),
        f"cut        {report['cut']:,} documents are longer than a row",
        f"special    {report['special_share']:.2%} of the targets are control tokens",
        "lengths    (tokens per document)",
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

    Every token stands where it is read, so a token is green when predicting it is learned.
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
    for token_id, is_target in [*tokens, (None, None)]:
        if is_target != colour and run:
            text = run.decode("utf-8", errors="replace")
            # Colour line by line: terminals carry a background over the line's end otherwise.
            style = TARGET if colour else CONTEXT
            painted.append("\n".join(f"{style}{line}{RESET}" if line else "" for line in text.split("\n")))
            run = b""
        colour = is_target
        run += b"" if token_id is None else tokenizer.token_bytes(token_id)
    return "".join(painted)


def open_rows(data_path: str, tokenizer, *, kind: str = "auto", **settings) -> PackedRows:
    """Return ``TextRows`` or ``ChatRows`` of the files, as ``kind`` says; "auto" asks the first usable record."""
    if kind == "auto":
        first = next(iter(read_records(split_paths(data_path)[0], on_reject=lambda *bad: None)))
        if first.kind not in ("text", "chat"):
            raise UserError(f"{data_path} holds {first.kind} records; the report reads text and conversations")
        kind = first.kind
    return (TextRows if kind == "text" else ChatRows)(data_path, tokenizer, **settings)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Read data files as training would, and print what is in them."""

    data_path: str = ""
    """Data files, separated by commas (default: the first known name in dataset/, else the demo world's)."""
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
    report = data_report(open_rows(data_path, tokenizer, kind=args.kind, **settings), tokenizer)
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
