"""Tokenises data files into shards (``shards.py``): each file once, then its shard is read from the cache.

The shard of a data file is the directory ``<cache_dir>/<key>/``. The key is a hash of everything that decides its
content: the file's bytes, the tokenizer (for conversations with its chat template), the side of the split, and the
settings. If one of them changes, another shard is made.

A shard is written atomically, and several processes may write the same one at once (``atomic_directory.py``). Memory is
bounded by ``CHUNK_CHARS``, whatever the size of the file.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.cache.atomic_directory import build_directory
from minillm.data.cache.file_hash import file_hash
from minillm.data.cache.sealed import write_sealed
from minillm.data.cache.shards import COLUMNS, LABEL, Shard, encoding_identity
from minillm.data.judged import mismatched
from minillm.data.reasoning import parse_reasoning
from minillm.data.records import read_records
from minillm.data.schema import Record
from minillm.data.sources.raw_records import check_file
from minillm.data.sources.rejects import reject_line
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError
from minillm.terminal import progress, shows_progress
from minillm.tokenizer.chat import encode_chat, encode_chats

FORMAT = 4  # raise it when the meaning of a shard's files or the encoding of texts changes: old shards are then ignored
CHUNK_CHARS = 1 << 20  # characters per call of the tokenizer, which needs about 200 times as many bytes of memory
CHUNK_RECORDS = 8192
LARGE_FILE = 4 << 20  # bytes; for larger files a bar or a line reports the progress
BY_LINES = (".jsonl", ".csv", ".tsv", ".txt")  # formats in which a record's line tells how much has been read
STAGES = {
    "text": "train_pretrain.py", "chat": "train_sft.py", "preference": "train_dpo.py",
    "judged": "train_dpo.py --loss_type kto",
}  # fmt: skip


def tokenise_files(path, tokenizer, *, kind: str, cache_dir: str | Path, strict: bool = False) -> list[Shard]:
    """Return the shards of all files; tokenise the files that have none in the cache.

    If the cache is complete, nothing is written. So in a distributed run let rank 0 call this first, wait at a barrier,
    then let the other ranks call it.

    Args:
        path: whatever ``expand_paths`` takes, or ``DataFiles``.
        kind: the kind of records expected: "text", "chat", "reason" (chats whose last answer begins with its thinking,
            see ``parse_reasoning``), "preference", or "judged" (a preference counts as a good and a bad answer).
        strict: a bad line is an error.

    Raises:
        UserError: a file is unreadable or has no usable record, the cache directory is not writable, or the requested
            side of the split has no record.
    """
    source = DataFiles.of(path)
    files = [check_file(file) for file in source.files]
    if kind != "text":  # report a tokenizer without chat tokens once, not for each record
        encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    shards = [_tokenise_file(file, source, tokenizer, kind, Path(cache_dir), strict) for file in files]
    if strict:
        for file, shard in zip(files, shards, strict=True):
            if shard.meta["n_rejected"]:  # the shard was made without strict
                first = json.loads(next(shard.rejected_lines()))
                raise UserError(f"{file}, line {first['line']}: {first['reason']}")
    if not any(shard.n_documents for shard in shards):
        rejected = [line for shard in shards for line in shard.rejected_lines()]
        if rejected:
            first = json.loads(rejected[0])
            raise UserError(
                f"the {source.side} side of --valid_ratio has no usable record; the first, line {first['line']}: "
                f"{first['reason']}"
            )
        raise source.empty_side(sum(shard.meta["n_other_side"] for shard in shards))
    return shards


def _tokenise_file(file: Path, source: DataFiles, tokenizer, kind: str, cache_dir: Path, strict: bool) -> Shard:
    """Return the shard of one file, from the cache or newly made."""
    sha256 = file_hash(file, memory=cache_dir / "file_hashes")
    # A .txt and a .jsonl with equal bytes hold different records, so the suffix is part of the key.
    suffixes = "".join(file.suffixes[-2:])
    settings = [FORMAT, kind, suffixes, sha256, encoding_identity(tokenizer, is_text=kind == "text"), source.key]
    shard_dir = cache_dir / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    shard = Shard.open_if_complete(shard_dir)
    if shard is not None:
        return shard
    try:
        build_directory(
            shard_dir,
            write=lambda directory: _write_shard(directory, file, source, tokenizer, kind, strict, sha256),
            is_complete=lambda directory: Shard.open_if_complete(directory) is not None,
        )
    except OSError as error:
        raise UserError(
            f"cannot write tokenised data to {cache_dir}: {error.strerror or error}; set another --cache_dir"
        ) from error
    shard = Shard.open_if_complete(shard_dir)
    if shard is None:
        raise UserError(f"the tokenised data in {shard_dir} is damaged: is the disk full?")
    return shard


def _write_shard(
    directory: Path, path: Path, source: DataFiles, tokenizer, kind: str, strict: bool, sha256: str
) -> None:
    n_bytes = path.stat().st_size
    is_large = n_bytes >= LARGE_FILE
    if is_large and not shows_progress():
        print(f"tokenising {path} ({n_bytes / 2**20:,.0f} MiB)", flush=True)
    # The bar counts bytes of the file if lines tell how much has been read, else bytes of text, without a total.
    n_lines = count_lines(path) if is_large and shows_progress() and path.suffix in BY_LINES else 0
    bar_settings = {"desc": f"tokenising {path.name}", "unit": "B", "unit_scale": True}
    bar = progress(total=n_bytes if n_lines else None, **bar_settings)
    with _ShardWriter(directory, path, kind, tokenizer.vocab_size, strict) as writer, bar:
        for chunk in _chunks(_records_to_store(path, source, kind, writer)):
            documents = _encode_or_reject(chunk, tokenizer, kind, writer.reject)
            writer.append(documents)
            if n_lines:
                bar.update(n_bytes * chunk[-1].line // n_lines - bar.n)
            else:
                bar.update(sum(document.n_bytes for document in documents))
    writer.finish(sha256)


def count_lines(path: Path) -> int:
    """Return the number of lines of a file, at least 1."""
    with path.open("rb") as file:
        return max(1, sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")))


class _Document(NamedTuple):
    """One encoded document of a record."""

    record: Record
    ids: list[int]
    mask: list[int] | None
    n_bytes: int  # of its text, in UTF-8


class _ShardWriter:
    """Writes the files of one shard; a context manager, with ``finish`` after its end."""

    def __init__(self, directory: Path, data_path: Path, kind: str, vocab_size: int, strict: bool):
        self.directory, self.data_path, self.kind, self.strict = directory, data_path, kind, strict
        self.token_dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.counts = {"n_documents": 0, "n_tokens": 0, "n_bytes": 0, "n_rejected": 0, "n_other_side": 0}
        self._open_files = contextlib.ExitStack()

    def __enter__(self):
        names = ["tokens", *COLUMNS]
        if self.kind != "text":
            names.append("mask")
        if self.kind == "judged":
            names.append("label")
        with contextlib.ExitStack() as stack:
            self._files = {name: stack.enter_context((self.directory / f"{name}.bin").open("wb")) for name in names}
            self._rejected = stack.enter_context((self.directory / "rejected.jsonl").open("w", encoding="utf-8"))
            np.zeros(1, np.int64).tofile(self._files["offsets"])
            self._open_files = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._open_files.__exit__(*error)

    def reject(self, line: int, reason: str, raw: str | None) -> None:
        """Write down a bad line; with ``strict`` raise UserError."""
        if self.strict:
            raise UserError(f"{self.data_path}, line {line}: {reason}")
        self.counts["n_rejected"] += 1
        self._rejected.write(reject_line(line, reason, raw))

    def append(self, documents: list[_Document]) -> None:
        """Add documents to the arrays."""
        if not documents:
            return
        np.concatenate([np.asarray(d.ids, dtype=self.token_dtype) for d in documents]).tofile(self._files["tokens"])
        if "mask" in self._files:
            np.concatenate([np.asarray(d.mask, dtype=np.uint8) for d in documents]).tofile(self._files["mask"])
        log_probs = [document.record.log_prob for document in documents]
        columns = {
            "offsets": self.counts["n_tokens"] + np.cumsum([len(document.ids) for document in documents]),
            "lines": [document.record.line for document in documents],
            "bytes": [document.n_bytes for document in documents],
            "log_prob": [np.nan if log_prob is None else log_prob for log_prob in log_probs],
        }
        if "label" in self._files:
            columns["label"] = [document.record.label for document in documents]
        for name, values in columns.items():
            np.asarray(values, dtype=(COLUMNS | LABEL)[name]).tofile(self._files[name])
        self.counts["n_tokens"] = int(columns["offsets"][-1])
        self.counts["n_documents"] += len(documents)
        self.counts["n_bytes"] += sum(document.n_bytes for document in documents)

    def finish(self, sha256: str) -> None:
        """Sync the closed files and write ``meta.json``; UserError if the data file had no usable record."""
        if not self.counts["n_documents"] and not self.counts["n_other_side"]:
            with (self.directory / "rejected.jsonl").open(encoding="utf-8") as file:
                first = json.loads(next(file))
            raise UserError(
                f"{self.data_path} has no usable record; the first, line {first['line']}: {first['reason']}"
            )
        sizes = {}
        for path in self.directory.iterdir():
            with path.open("rb+") as file:  # Windows flushes only files that are open for writing
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        meta = {"kind": self.kind, "dtype": self.token_dtype.name, "sha256": sha256, "sizes": sizes}
        write_sealed(self.directory / "meta.json", self.counts | meta)


def _records_to_store(path: Path, source: DataFiles, kind: str, writer: _ShardWriter) -> Iterator[Record]:
    """Yield the records of the requested side and kind; judged answers with a reply to another prompt."""

    def ignore(*bad_line) -> None:
        """Bad lines have no side; the training side reports them."""

    is_valid_side = bool(source.valid_ratio) and source.side == "valid"
    on_reject = ignore if is_valid_side else writer.reject
    all_records = read_records(path, strict=writer.strict, on_reject=on_reject, columns=source.columns)

    def records() -> Iterator[Record]:
        for record in all_records:
            if not source.takes(record):
                writer.counts["n_other_side"] += 1
            elif _has_kind(record, kind, writer.reject):
                yield record

    if kind != "judged":
        yield from records()
        return
    try:
        yield from mismatched(records())
    except UserError as error:  # there is only one question, perhaps because the split has put the others elsewhere
        side = f", {source.side} side of --valid_ratio {source.valid_ratio}" if source.valid_ratio else ""
        raise UserError(f"{path}{side}: {error}") from None


def _has_kind(record: Record, kind: str, reject: Callable) -> bool:
    """Return whether a record is of the expected kind; reject it if not."""
    allowed_kinds = {"judged": ("judged", "preference"), "reason": ("chat",)}.get(kind, (kind,))
    try:
        if record.kind not in allowed_kinds:
            raise UserError(
                f"a {record.kind} record, where {allowed_kinds[0]} records are expected: it is data for "
                f"{STAGES[record.kind]}"
            )
        if kind == "reason":
            answer = [message for message in record.messages if message["role"] == "assistant"][-1]
            thinking = answer.get("reasoning_content")
            parse_reasoning((f"<think>{thinking}</think>" if thinking else "") + (answer.get("content") or ""))
    except UserError as error:
        reject(record.line, str(error), None)
        return False
    return True


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yield lists of records of bounded size; a full list is yielded before the next record is read."""
    chunk, n_chars = [], 0
    for record in records:
        chunk.append(record)
        n_chars += sum(map(len, _texts(record)))
        if n_chars >= CHUNK_CHARS or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _conversations(record: Record) -> list[list[dict]]:
    """Return the record's conversations: one, or two with different replies."""
    replies = [reply for reply in (record.chosen, record.rejected) if reply is not None]
    return [record.messages + reply for reply in replies] or [record.messages]


def _texts(record: Record) -> list[str]:
    if record.kind == "text":
        return [record.text]
    contents = [message.get("content") or "" for messages in _conversations(record) for message in messages]
    return contents if record.tools is None else [*contents, json.dumps(record.tools)]


def _encode(records: list[Record], tokenizer, kind: str) -> list[_Document]:
    """Return the encoded documents of all records."""
    if kind == "text":
        owners, texts = records, [record.text for record in records]
        encoded = [(tokenizer.document(ids), None) for ids in tokenizer.encode_batch(texts)]
    else:
        owners = [record for record in records for _ in _conversations(record)]
        conversations = [messages for record in records for messages in _conversations(record)]
        train_on = "last" if kind in ("preference", "judged") else "all"
        tools = [record.tools for record in owners]
        encoded = encode_chats(tokenizer, conversations, tools=tools, train_on=train_on)
        texts = ["".join(message.get("content") or "" for message in messages) for messages in conversations]
    n_bytes = [len(text.encode("utf-8")) for text in texts]
    return [_Document(r, ids, mask, n) for r, (ids, mask), n in zip(owners, encoded, n_bytes, strict=True)]


def _encode_or_reject(records: list[Record], tokenizer, kind: str, reject: Callable) -> list[_Document]:
    """Return the encoded documents of all records that can be encoded; reject the others."""
    try:
        return _encode(records, tokenizer, kind)
    except (UserError, UnicodeEncodeError):  # at least one is bad: encode them one by one
        pass
    documents = []
    for record in records:
        try:
            documents += _encode([record], tokenizer, kind)
        except UnicodeEncodeError as error:
            reject(record.line, f"the text holds a lone surrogate ({error.reason}): it has no UTF-8 form", None)
        except UserError as error:
            reject(record.line, str(error), None)
    return documents
