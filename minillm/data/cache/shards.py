"""Tokenised files on disk: each data file is tokenised once and memory-mapped ever after.

A shard is a directory ``<cache_dir>/<key>/`` for one data file, where ``key`` hashes the file's content, everything of
the tokenizer that decides ids (for conversations its chat template too), which records are held out, and the settings;
change any of them and another shard is made. It holds plain arrays:

    tokens.bin    uint16 (uint32 for vocabularies over 65,536): the documents' ids, one after the other
    mask.bin      uint8, not for texts: 1 where the token is to be predicted
    offsets.bin   int64, n_documents + 1: where each document begins
    lines.bin     int64: line of each document in its file
    bytes.bin     int64: UTF-8 bytes of each document's text
    log_prob.bin  float64: exact log-probability of each document (NaN where unknown)
    label.bin     int8, judged answers only: 1 for a good one, 0 for a bad one
    rejected.jsonl, meta.json

A text is stored as a whole document (``Tokenizer.document``), a conversation as its chat encoding with every
assistant turn marked. Two kinds have two documents per record, whose last turn alone is marked: "preference"
the chosen and the rejected reply to one prompt; "judged" a reply, and the reply to another prompt in its place.
A shard is whole or absent, and several processes may make the same one at once (``whole_directory.py``). Memory is
bounded by ``CHUNK_CHARS``, whatever the file's size.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from minillm.data.cache.file_hash import file_hash
from minillm.data.cache.sealed import read_sealed, write_sealed
from minillm.data.cache.whole_directory import build_directory
from minillm.data.judged import mismatched
from minillm.data.reasoning import parse_reasoning
from minillm.data.schema import Record, read_records
from minillm.data.sources.files import check_file, expand_paths
from minillm.data.sources.rejects import publish_rejected, reject_line
from minillm.data.sources.split import DataFiles
from minillm.errors import UserError
from minillm.terminal import progress, shows_progress
from minillm.tokenizer.chat import encode_chat, encode_chats

FORMAT = 3  # raise it when the files' meaning changes, or how texts become ids: old shards are then ignored
CHUNK_CHARS = 1 << 20  # text handed to the tokenizer at once; its working memory is about 200 times this
CHUNK_RECORDS = 8192
LARGE_FILE = 4 << 20  # bytes, from which on tokenising is announced
BY_LINES = (".jsonl", ".csv", ".tsv", ".txt")  # files whose records know their line, and so how far reading is
COLUMNS = {"offsets": np.int64, "lines": np.int64, "bytes": np.int64, "log_prob": np.float64}
LABEL = {"label": np.int8}
STAGES = {
    "text": "train_pretrain.py", "chat": "train_sft.py", "preference": "train_dpo.py",
    "judged": "train_dpo.py --loss_type kto",
}  # fmt: skip


class Shard:
    """One tokenised file, memory-mapped. Arrays: ``tokens``, ``mask`` (or None), ``offsets``, ``lines``,
    ``bytes``, ``log_prob``. It pickles as its path, so that worker processes map it again."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.meta = read_sealed(self.path / "meta.json")

    def __getstate__(self):
        return {"path": self.path, "meta": self.meta}

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return self.meta["n_documents"]

    @property
    def n_tokens(self) -> int:
        """Number of stored tokens, those that begin and end documents and turns included."""
        return self.meta["n_tokens"]

    def _map(self, name: str, dtype) -> np.ndarray:
        path = self.path / f"{name}.bin"
        if not os.path.getsize(path):  # an empty side of a split; an empty file cannot be mapped
            return np.zeros(0, dtype)
        # A plain array over the same pages: np.memmap's own indexing is several times slower.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    @cached_property
    def tokens(self) -> np.ndarray:
        """(n_tokens,) ids."""
        return self._map("tokens", self.meta["dtype"])

    @cached_property
    def mask(self) -> np.ndarray | None:
        """(n_tokens,) 1 where the token is to be predicted; None where every token is."""
        return self._map("mask", np.uint8) if self.meta["kind"] != "text" else None

    def __getattr__(self, name: str) -> np.ndarray:
        dtype = (COLUMNS | LABEL).get(name)
        if dtype is None:
            raise AttributeError(name)
        column = self._map(name, dtype)
        self.__dict__[name] = column
        return column

    def rejected_lines(self) -> Iterator[str]:
        """Yield the finished lines of the file's bad lines."""
        with (self.path / "rejected.jsonl").open(encoding="utf-8") as file:
            yield from file

    @classmethod
    def open_if_whole(cls, path: Path) -> "Shard | None":
        """Return the shard, or None when it is absent or its files lack bytes (a full disk, a bad copy)."""
        try:
            shard = cls(path)
            whole = all(os.path.getsize(path / name) == size for name, size in shard.meta["sizes"].items())
        except (OSError, ValueError):
            return None
        return shard if whole else None


def split_paths(path: str | Path | list | DataFiles) -> list[Path]:
    """Return the files that ``path`` names (see ``expand_paths``), at least one."""
    files = expand_paths(path.path if isinstance(path, DataFiles) else path)
    if not files:
        raise UserError("no data file given: set --data_path")
    return files


def prepare(path, tokenizer, *, kind: str, cache_dir: str | Path, strict: bool = False) -> list[Shard]:
    """Return the shards of all files, tokenising those that the cache lacks.

    Where the cache is complete nothing is written: in a distributed run let rank 0 call this first, wait at
    a barrier, then let the others call it.

    Args:
        path: whatever ``expand_paths`` takes, or ``DataFiles``: one side of a split, other names for keys.
        kind: the records expected: "text", "chat", "reason" (chats whose last answer thinks first, see
            ``parse_reasoning``), "preference", "judged" (which takes preferences too, as a good and a bad answer).
        strict: a bad line is fatal.

    Raises UserError for unreadable files, files without a usable record, an unwritable cache directory, a side of a
    split without a record.
    """
    source = DataFiles.of(path)
    files = [check_file(file) for file in split_paths(source)]
    if kind != "text":  # a tokenizer without chat tokens is one error, not one per record
        encode_chat(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    shards = [_prepare_one(file, source, tokenizer, kind, Path(cache_dir), strict) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if strict and shard.meta["n_rejected"]:
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


def encoding_identity(tokenizer, *, is_text: bool) -> str:
    """Return the hash of what of a tokenizer decides the ids of stored documents: texts know no chat template."""
    return tokenizer.document_hash if is_text else tokenizer.encoding_hash


def count_lines(path: Path) -> int:
    """Return the number of lines of a file, at least 1."""
    with path.open("rb") as file:
        return max(1, sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b"")))


def _prepare_one(file: Path, source: DataFiles, tokenizer, kind: str, cache_dir: Path, strict: bool) -> Shard:
    content = file_hash(file, memory=cache_dir / "file_hashes")
    # A .txt and a .jsonl of equal bytes read differently, so the kind of file belongs to the key.
    suffixes = "".join(file.suffixes[-2:])
    settings = [FORMAT, kind, suffixes, content, encoding_identity(tokenizer, is_text=kind == "text"), source.key]
    final = cache_dir / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    shard = Shard.open_if_whole(final)
    if shard is not None:
        return shard
    try:
        build_directory(
            final,
            write=lambda partial: _write(partial, file, source, tokenizer, kind, strict, content),
            is_whole=lambda place: Shard.open_if_whole(place) is not None,
        )
    except OSError as error:
        raise UserError(
            f"cannot write tokenised data to {cache_dir}: {error.strerror or error}; set another --cache_dir"
        ) from error
    shard = Shard.open_if_whole(final)
    if shard is None:
        raise UserError(f"the tokenised data in {final} is damaged: is the disk full?")
    return shard


def _write(
    partial: Path, path: Path, source: DataFiles, tokenizer, kind: str, strict: bool, content: str
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    names = ["tokens", *COLUMNS] + (["mask"] if kind != "text" else []) + (["label"] if kind == "judged" else [])
    counts = {"n_documents": 0, "n_tokens": 0, "n_bytes": 0, "n_rejected": 0, "n_other_side": 0}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((partial / f"{name}.bin").open("wb")) for name in names}
        rejects = stack.enter_context((partial / "rejected.jsonl").open("w", encoding="utf-8"))
        np.zeros(1, np.int64).tofile(files["offsets"])
        n_bytes = path.stat().st_size
        if n_bytes >= LARGE_FILE and not shows_progress():
            print(f"tokenising {path} ({n_bytes / 2**20:,.0f} MiB)", flush=True)
        # Bytes of the file where its lines tell how far reading is, else bytes of text, without a total.
        is_by_lines = path.suffix in BY_LINES and n_bytes >= LARGE_FILE and shows_progress()
        n_lines = count_lines(path) if is_by_lines else 0
        bar = {"desc": f"tokenising {path.name}", "unit": "B", "unit_scale": True}
        bar = stack.enter_context(progress(total=n_bytes if n_lines else None, **bar))

        def reject(line: int, reason: str, raw: str | None) -> None:
            if strict:
                raise UserError(f"{path}, line {line}: {reason}")
            counts["n_rejected"] += 1
            rejects.write(reject_line(line, reason, raw))

        def one_side(records: Iterator[Record]) -> Iterator[Record]:
            for record in records:
                if source.takes(record):
                    yield record
                else:
                    counts["n_other_side"] += 1

        where = f"{path}, {source.side} side of --valid_ratio {source.valid_ratio}" if source.valid_ratio else str(path)
        # A line that is not a record has no side: the training side reports it.
        on_reject = (lambda *bad: None) if source.valid_ratio and source.side == "valid" else reject
        records = one_side(read_records(path, strict=strict, on_reject=on_reject, columns=source.columns))
        for chunk in _chunks(_only(kind, records, reject, where)):
            encoded = _encode(chunk, tokenizer, kind, reject)
            _append(files, encoded, dtype, counts)
            bar.update(n_bytes * chunk[-1].line // n_lines - bar.n if n_lines else sum(one[-1] for one in encoded))
    if not counts["n_documents"] and not counts["n_other_side"]:
        with (partial / "rejected.jsonl").open(encoding="utf-8") as file:
            first = json.loads(next(file))
        raise UserError(f"{path} has no usable record; the first, line {first['line']}: {first['reason']}")
    for part in partial.iterdir():
        with part.open("rb+") as file:  # Windows flushes only what is open for writing
            os.fsync(file.fileno())
    sizes = {part.name: part.stat().st_size for part in partial.iterdir()}
    meta = counts | {"kind": kind, "dtype": dtype.name, "sha256": content, "sizes": sizes}
    write_sealed(partial / "meta.json", meta)


def _only(kind: str, records: Iterator[Record], reject, where: str) -> Iterator[Record]:
    wanted = (r for r in records if _is(kind, r, reject))
    if kind != "judged":
        yield from wanted
        return
    try:
        yield from mismatched(wanted)
    except UserError as error:  # one question, perhaps because the others are on the other side of a split
        raise UserError(f"{where}: {error}") from None


def _is(kind: str, record: Record, reject) -> bool:
    wanted = {"judged": ("judged", "preference"), "reason": ("chat",)}.get(kind, (kind,))
    try:
        if record.kind not in wanted:
            meant = STAGES[record.kind]
            raise UserError(f"a {record.kind} record, where {wanted[0]} records are expected: it is data for {meant}")
        if kind == "reason":
            answer = [message for message in record.messages if message["role"] == "assistant"][-1]
            thinking = answer.get("reasoning_content")
            parse_reasoning((f"<think>{thinking}</think>" if thinking else "") + (answer.get("content") or ""))
    except UserError as error:
        reject(record.line, str(error), None)
        return False
    return True


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Yield lists of records of bounded size: a full one is handed on before the next record is read."""
    chunk, n_chars = [], 0
    for record in records:
        chunk.append(record)
        n_chars += sum(map(len, _texts(record)))
        if n_chars >= CHUNK_CHARS or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _documents(record: Record) -> list[list[dict]]:
    """Return the record's conversations: one, or two with different replies."""
    replies = [reply for reply in (record.chosen, record.rejected) if reply is not None]
    return [record.messages + reply for reply in replies] or [record.messages]


def _texts(record: Record) -> list[str]:
    if record.kind == "text":
        return [record.text]
    return [message.get("content") or "" for messages in _documents(record) for message in messages]


def _encode(records: list[Record], tokenizer, kind: str, reject) -> list[tuple]:
    """Return (record, ids, mask or None, UTF-8 bytes) of each document of a record that can be encoded."""

    def encode(some: list[Record]) -> list[tuple]:
        if kind == "text":
            owners, texts = some, [record.text for record in some]
            encoded = [(tokenizer.document(ids), None) for ids in tokenizer.encode_batch(texts)]
        else:
            owners = [record for record in some for _ in _documents(record)]
            conversations = [messages for record in some for messages in _documents(record)]
            train_on = "last" if kind in ("preference", "judged") else "all"
            encoded = encode_chats(tokenizer, conversations, train_on=train_on)
            texts = ["".join(message.get("content") or "" for message in messages) for messages in conversations]
        n_bytes = [len(text.encode("utf-8")) for text in texts]
        return [(r, ids, mask, n) for r, (ids, mask), n in zip(owners, encoded, n_bytes, strict=True)]

    try:
        return encode(records)
    except (UserError, UnicodeEncodeError):  # a lone surrogate, say: find the guilty ones
        encoded = []
        for record in records:
            try:
                encoded += encode([record])
            except UnicodeEncodeError as error:
                reject(
                    record.line,
                    f"the text holds a lone surrogate ({error.reason}): it has no UTF-8 form",
                    None,
                )
            except UserError as error:
                reject(record.line, str(error), None)
        return encoded


def _append(files: dict, encoded: list[tuple], dtype: np.dtype, counts: dict) -> None:
    if not encoded:
        return
    records, ids, masks, n_bytes = zip(*encoded, strict=True)
    np.concatenate([np.asarray(one, dtype=dtype) for one in ids]).tofile(files["tokens"])
    if "mask" in files:
        np.concatenate([np.asarray(one, dtype=np.uint8) for one in masks]).tofile(files["mask"])
    columns = {
        "offsets": counts["n_tokens"] + np.cumsum([len(one) for one in ids]),
        "lines": [record.line for record in records],
        "bytes": n_bytes,
        "log_prob": [np.nan if record.log_prob is None else record.log_prob for record in records],
    }
    if "label" in files:
        columns["label"] = [record.label for record in records]
    for name, values in columns.items():
        np.asarray(values, dtype=(COLUMNS | LABEL)[name]).tofile(files[name])
    counts["n_tokens"] = int(columns["offsets"][-1])
    counts["n_documents"] += len(records)
    counts["n_bytes"] += sum(n_bytes)


class TokenStore:
    """Several shards as one sequence of documents; token indices count over all of them."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.token_bases = np.cumsum([0] + [shard.n_tokens for shard in shards])
        self.has_mask = shards[0].meta["kind"] != "text"
        self.document_bases = np.cumsum([0] + [shard.n_documents for shard in shards])

    def __getstate__(self):  # offsets may be large or mapped: workers rebuild them
        return {name: value for name, value in self.__dict__.items() if name != "offsets"}

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n_documents + 1,) where each document begins."""
        if len(self.shards) == 1:
            return self.shards[0].offsets
        parts = [s.offsets[:-1] + base for s, base in zip(self.shards, self.token_bases[:-1], strict=True)]
        return np.concatenate([*parts, self.token_bases[-1:]])

    @property
    def n_documents(self) -> int:
        """Number of documents in all shards."""
        return int(self.document_bases[-1])

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all shards."""
        return int(self.token_bases[-1])

    def gather(self, column: str, index: np.ndarray) -> np.ndarray:
        """Return ``tokens`` (int64) or ``mask`` (uint8) at global token indices."""
        dtype = np.int64 if column == "tokens" else np.uint8
        if len(self.shards) == 1:
            return getattr(self.shards[0], column)[index].astype(dtype)
        out = np.empty(len(index), dtype)
        owner = np.searchsorted(self.token_bases, index, side="right") - 1
        for part in np.unique(owner):
            here = owner == part
            out[here] = getattr(self.shards[part], column)[index[here] - self.token_bases[part]]
        return out

    def log_prob(self) -> float | None:
        """Return Σ log_prob in nats, or None unless every record has one."""
        total = float(sum(np.sum(shard.log_prob) for shard in self.shards))
        return None if np.isnan(total) else total

    def rejected_lines(self, more: list[list[tuple]]) -> list[list[str]]:
        """Return, by file, the finished lines of its ``.rejected.jsonl``: bad ones, and ``more`` [(line, reason)]."""
        pairs = zip(self.shards, more, strict=True)
        return [[*shard.rejected_lines(), *(reject_line(*pair) for pair in extra)] for shard, extra in pairs]

    def publish_rejected(self, source: DataFiles, more: list[list[tuple]], cache_dir: Path) -> list[str]:
        """Write each file's ``.rejected.jsonl`` (see ``rejected_lines``); return where they are.

        Those of the held-out side go to ``<file>.valid.rejected.jsonl``, or they would replace the training side's.
        """
        places = []
        for file, lines in zip(split_paths(source), self.rejected_lines(more), strict=True):
            if source.valid_ratio and source.side == "valid":
                file = file.with_name(f"{file.name}.valid")
            place = publish_rejected(file, lines, fallback_dir=cache_dir)
            places += [str(place)] if place else []
        return places
