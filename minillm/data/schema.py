"""One reader for all data files, and one form for all records.

Files: ``.jsonl``, ``.jsonl.gz``, ``.parquet`` (one record per line or row) and ``.txt``. Records are told
apart by their keys; everything on the left becomes a ``Record``:

    {"text"}                                          -> "text"        text
    {"conversations": [{"role", "content"}]}          -> "chat"        messages
    {"conversations": [{"from", "value"}]} (ShareGPT) -> "chat"        messages
    {"messages": [{"role", "content"}]}               -> "chat"        messages
    {"instruction", "input", "output"} (alpaca)       -> "chat"        messages
    {"conversation": [{"system", "input", "output"}]} -> "chat"        messages
    {"chosen", "rejected"}, two conversations         -> "preference"  messages (shared), chosen, rejected
    {"prompt", "chosen", "rejected"}                  -> "preference"  messages (prompt), chosen, rejected
    {"prompt", "completion", "label"}                 -> "judged"      messages (prompt), chosen, label

A ``.txt`` file has no records. It is cut at blank lines into documents of about 4,000 characters: paragraphs
that belong together mostly stay together, and a file of any size is read in bounded memory.
"""

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.rejects import publish_rejected, reject_line
from minillm.errors import UserError, missing_package
from minillm.tokenizer.chat import ROLES, check_messages

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
SCHEMAS = (
    "text; conversations; messages; instruction+output; conversation; chosen+rejected; "
    "prompt+chosen+rejected; prompt+completion+label"
)
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
TXT_DOCUMENT_LEN = 4096  # characters after which the next blank line ends a document
TXT_DOCUMENT_MAX = 65536  # characters after which any line end does (and no line is read beyond that at once)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One usable record in normal form; which fields are set depends on ``kind`` (see the module's table)."""

    kind: str
    line: int  # 1-based line (jsonl, first line of a txt document) or row (parquet)
    text: str | None = None
    messages: list[dict] | None = None
    chosen: list[dict] | None = None
    rejected: list[dict] | None = None
    label: bool | None = None
    log_prob: float | None = None  # exact log-probability in nats, where the maker of the data knows it
    extra: dict = field(default_factory=dict)  # all other keys of the record, untouched


def read_records(
    path: str | Path,
    *,
    strict: bool = False,
    on_reject: Callable[[int, str, str], None] | None = None,
) -> Iterator[Record]:
    """Return an iterator over the usable records of a file, in order, in bounded memory.

    Args:
        strict: a bad line is fatal (``UserError`` that names it) instead of being set aside.
        on_reject: called with (line, reason, raw text) of each bad line. By default they are written to
            ``<path>.rejected.jsonl`` once the file is read.

    Raises UserError at once for a missing, empty or unknown kind of file; at the end if no record was usable.
    """
    path = check_file(path)
    if on_reject is None:
        return _read_and_publish(path, strict)
    return _read(path, strict, on_reject)


def check_file(path: str | Path) -> Path:
    """Return ``path`` as a Path; UserError when it is missing, empty, or of no known kind."""
    path = Path(path)
    if not path.is_file():
        what = "it is a directory; name its files" if path.is_dir() else "check the path"
        raise UserError(f"no such data file: {path} ({what})")
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: unknown kind of file; readable are {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty: give a file with at least one record")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    return path


def parse_record(value: object, line: int) -> Record:
    """Return the record in normal form; UserError with the reason when it fits no schema or breaks it."""
    if not isinstance(value, dict):
        raise UserError(f"a JSON object is expected, not {type(value).__name__}")
    for keys, parse in _PARSERS:
        if all(value.get(key) is not None for key in keys):
            fields, used = parse(value)
            extra = {key: item for key, item in value.items() if key not in used and key != "log_prob"}
            return Record(line=line, log_prob=_log_prob(value), extra=extra, **fields)
    raise UserError(f"the keys ({', '.join(map(str, value)) or 'none'}) fit no schema; known: {SCHEMAS}")


# ---- files -----------------------------------------------------------------------------------------------


def _read_and_publish(path: Path, strict: bool) -> Iterator[Record]:
    rejected: list[str] = []
    finished = False  # a reader that stops early knows only some of the bad lines: it must not write them
    try:
        yield from _read(path, strict, lambda *bad: rejected.append(reject_line(*bad)))
        finished = True
    except UserError:  # no usable record, or a strict reader (which has set nothing aside)
        finished = True
        raise
    finally:
        if finished and rejected:
            where = publish_rejected(path, rejected, fallback_dir=None)
            print(f"{path}: {len(rejected)} bad lines, see {where or 'nowhere (not writable)'}", file=sys.stderr)


def _read(path: Path, strict: bool, on_reject: Callable) -> Iterator[Record]:
    n_usable = n_rejected = 0
    first_reason = ""
    for line, raw, value in _raw_records(path):
        try:
            if isinstance(value, Exception):
                raise UserError(_json_reason(value))
            record = parse_record(value, line)
        except UserError as error:
            if strict:
                raise UserError(f"{path}, line {line}: {error}") from None
            first_reason = first_reason or f"line {line}: {error}"
            n_rejected += 1
            on_reject(line, str(error), raw if isinstance(raw, str) else json.dumps(raw, default=str))
            continue
        n_usable += 1
        yield record
    if not n_usable:
        if n_rejected:
            raise UserError(f"{path} has no usable record: all {n_rejected} lines are bad; the first, {first_reason}")
        raise UserError(f"{path} is empty: give a file with at least one record")


def _raw_records(path: Path) -> Iterator[tuple[int, object, object]]:
    """Yield (line, raw, value); value is the exception where the line could not be parsed."""
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
        elif path.name.endswith(".txt"):
            for line, text in _txt_documents(path):
                yield line, text, {"text": text}
        else:
            yield from _json_lines(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}): copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, object, object]]:
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "rb") as file:
        for line, data in enumerate(file, start=1):
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put first
            if data.isspace() or not data:
                continue
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, absurd numbers, nesting
                value = error
            yield line, data.decode("utf-8", errors="replace").rstrip("\r\n"), value


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON ({error.msg}, column {error.pos + 1})"
    return f"broken JSON ({error})"


def _parquet_rows(path: Path) -> Iterator[tuple[int, object, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_package("pyarrow", purpose=f"reading {path}", extra="parquet") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        line = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                line += 1
                yield line, row, _without_nulls(row)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter: a text or date that is none
        raise UserError(f"{path} is not a readable parquet file ({error})") from None


def _without_nulls(value):
    """A parquet column holds a null where a JSON record would lack the key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _txt_documents(path: Path) -> Iterator[tuple[int, str]]:
    pieces: list[str] = []
    length = first_line = 0
    line = 1
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        while piece := file.readline(TXT_DOCUMENT_MAX):
            blank = piece.isspace()
            if pieces or not blank:  # blank lines before a document belong to none
                first_line = first_line if pieces else line
                pieces.append(piece)
                length += len(piece)
            line += piece.endswith("\n")
            if (blank and length >= TXT_DOCUMENT_LEN) or length >= TXT_DOCUMENT_MAX:
                yield first_line, "".join(pieces).strip("\r\n")
                pieces, length = [], 0
    if pieces:
        yield first_line, "".join(pieces).strip("\r\n")


# ---- schemas: each parser returns the fields of Record, and the keys it has used -------------------------


def _text(value: dict):
    text = value["text"]
    if not isinstance(text, str):
        raise UserError(f"text must be a string, not {type(text).__name__}")
    if not text.strip():
        raise UserError("text is empty")
    return {"kind": "text", "text": text}, {"text"}


def _conversations(value: dict):
    messages = _messages(value["conversations"])
    check_messages(messages)
    if isinstance(value.get("system"), str) and value["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": value["system"]}, *messages]
    return {"kind": "chat", "messages": messages}, {"conversations", "system"}


def _openai_messages(value: dict):
    messages = _messages(value["messages"])
    check_messages(messages)
    return {"kind": "chat", "messages": messages}, {"messages"}


def _alpaca(value: dict):
    parts, history = (value["instruction"], value.get("input") or ""), value.get("history") or []
    if not all(isinstance(part, str) for part in parts):
        raise UserError("instruction and input must be strings")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of pairs [question, answer]")
    turns = [*history, ("\n".join(filter(None, parts)), value["output"])]
    messages = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    check_messages(messages)
    return {"kind": "chat", "messages": messages}, {"instruction", "input", "output", "system", "history"}


def _conversation(value: dict):
    messages = []
    for place, turn in enumerate(_list(value["conversation"], "conversation")):
        if not isinstance(turn, dict) or "output" not in turn:
            raise UserError(f"turn {place} of conversation must be an object with input and output")
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        if turn.get("input"):
            messages.append({"role": "user", "content": turn["input"]})
        messages.append({"role": "assistant", "content": turn["output"]})
    check_messages(messages)
    return {"kind": "chat", "messages": messages}, {"conversation"}


def _preference(value: dict):
    sides = {side: _reply(value[side], side) for side in ("chosen", "rejected")}
    if value.get("prompt") is not None:
        prompt = _prompt(value["prompt"])
        # Some files repeat the prompt at the head of both replies, others give the replies alone.
        sides = {s: m[len(prompt) :] if m[: len(prompt)] == prompt else m for s, m in sides.items()}
    else:
        if any(isinstance(value[side], str) for side in sides):
            raise UserError("chosen and rejected are strings without a prompt: add prompt, or give message lists")
        prompt = sides["chosen"][:-1]
        if prompt != sides["rejected"][:-1]:
            raise UserError("chosen and rejected must share every message but the last")
        sides = {s: m[-1:] for s, m in sides.items()}
    _check_replies(prompt, sides)
    return {"kind": "preference", "messages": prompt, **sides}, {"prompt", "chosen", "rejected"}


def _judged(value: dict):
    prompt, reply, label = _prompt(value["prompt"]), _reply(value["completion"], "completion"), value["label"]
    if not isinstance(label, (bool, int)) or label not in (0, 1):
        raise UserError(f"label is {label!r}; allowed: true, false")
    _check_replies(prompt, {"completion": reply})
    fields = {"kind": "judged", "messages": prompt, "chosen": reply, "label": bool(label)}
    return fields, {"prompt", "completion", "label"}


_PARSERS = (
    (("chosen", "rejected"), _preference),
    (("prompt", "completion", "label"), _judged),
    (("conversations",), _conversations),
    (("messages",), _openai_messages),
    (("conversation",), _conversation),
    (("instruction", "output"), _alpaca),
    (("text",), _text),
)


def _log_prob(value: dict) -> float | None:
    log_prob = value.get("log_prob")
    if log_prob is None:
        return None
    is_number = isinstance(log_prob, (int, float)) and not isinstance(log_prob, bool)
    if not is_number or not abs(log_prob) <= sys.float_info.max:  # JSON has NaN, Infinity and integers of any size
        raise UserError(f"log_prob is {log_prob!r}; a finite number of nats is expected")
    return float(log_prob)


def _list(value, name: str) -> list:
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of at least one entry")
    return value


def _messages(items) -> list[dict]:
    """Return role/content messages; ShareGPT's from/value are renamed, everything else stays."""
    messages = []
    for place, item in enumerate(_list(items, "the conversation")):
        if isinstance(item, dict) and "from" in item and "role" not in item:
            role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
            if role is None:
                allowed = ", ".join([*ROLES, *(r for r in SHAREGPT_ROLES if r not in ROLES)])
                raise UserError(f"message {place} has the unknown role {item['from']!r}; allowed: {allowed}")
            item = {"role": role, "content": item.get("value")}
        messages.append(item)
    return messages


def _prompt(value) -> list[dict]:
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value)
    check_messages(messages, need_answer=False)
    return messages


def _reply(value, name: str) -> list[dict]:
    if not isinstance(value, (str, list)):
        raise UserError(f"{name} must be a string or a list of messages, not {type(value).__name__}")
    return [{"role": "assistant", "content": value}] if isinstance(value, str) else _messages(value)


def _check_replies(prompt: list[dict], sides: dict[str, list[dict]]) -> None:
    if not prompt:
        raise UserError("there is no prompt before the reply: at least one message is needed")
    for name, reply in sides.items():
        check_messages([*prompt, *reply])
        if not reply or reply[-1]["role"] != "assistant":
            raise UserError(f"{name} must end with an assistant turn")
        if not (reply[-1].get("content") or "").strip() and not reply[-1].get("tool_calls"):
            raise UserError(f"{name} is an empty answer: there is nothing to compare")
    if sides.get("chosen") == sides.get("rejected", ()):
        raise UserError("chosen and rejected are equal: neither is to be preferred")
