"""The first pass: reads all files, in this process or with several, and stores the outcome of each record in order."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from minillm.data.prepare.one_record import Cleaner, Outcome, RawRecord
from minillm.data.records import TABLES, with_our_names
from minillm.data.schema import parse_record
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import data_suffix
from minillm.data.sources.raw_records import read_raw
from minillm.errors import UserError

CHUNK_RECORDS = 512
CHUNK_CHARS = 1 << 20  # of the raw records of a chunk, estimated
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
AHEAD = 4  # chunks per process that are read before the first one is done


def read_raw_records(file_index: int, path: Path, name: str, *, is_reference: bool) -> Iterator[RawRecord]:
    """Yield the records of a file as they are; ``name`` is what the user calls the file."""
    is_table = data_suffix(path) in TABLES
    for line, raw, value in read_raw(path):
        text = (raw if isinstance(raw, str) else repr(raw)) if isinstance(value, UserError) else None
        yield RawRecord(file_index, name, line, value, text, is_table, is_reference)


def first_kind(files: list[Path], columns: str) -> str:
    """Return the kind of the first usable record of the files.

    Raises:
        UserError: no record is usable; the message has the first reason.
    """
    first_reason = "there is none"
    names = parse_columns(columns)
    for path in files:
        for line, _, value in read_raw(path):
            try:
                return parse_record(with_our_names(value, names, data_suffix(path) in TABLES), line).kind
            except UserError as error:
                first_reason = f"{path}, line {line}: {error}" if first_reason == "there is none" else first_reason
    raise UserError(f"no usable record in {', '.join(map(str, files))}; the first, {first_reason}")


def clean_all(
    raw_records: Iterator[RawRecord], make_cleaner: Callable[[], Cleaner], n_workers: int
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of all records in chunks, in order, in bounded memory."""
    chunks = _chunks(raw_records)
    if not n_workers:
        cleaner = make_cleaner()
        for chunk in chunks:
            yield [cleaner(raw) for raw in chunk]
        return
    # Forked workers share what was read for all of them, such as the evaluation questions.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(n_workers, context, initializer=_start, initargs=(make_cleaner, os.getpid()))
    pending: deque = deque()
    try:
        for chunk in chunks:
            with contextlib.nullcontext() if pending else _signals_wait():
                pending.append(pool.submit(_clean, chunk))
            if len(pending) >= AHEAD * n_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process has ended, perhaps for lack of memory: give fewer --num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(raw_records: Iterator[RawRecord]) -> Iterator[list[RawRecord]]:
    chunk, n_chars = [], 0
    for raw in raw_records:
        chunk.append(raw)
        n_chars += _length(raw.value)
        if n_chars >= CHUNK_CHARS or len(chunk) >= CHUNK_RECORDS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _length(value) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    return sum(map(_length, value)) if isinstance(value, list) else 1


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals wait while worker processes start: Python loses an exception that is raised within a fork."""
    if threading.current_thread() is not threading.main_thread():  # which handles no signals
        yield
        return
    caught: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in caught:
            signal.raise_signal(number)


_cleaner: Cleaner | None = None  # of a worker process


def _start(make_cleaner: Callable[[], Cleaner], parent: int) -> None:
    """Prepare a worker process: Ctrl-C is for its parent, without which it ends."""
    global _cleaner
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _cleaner = make_cleaner()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _clean(chunk: list[RawRecord]) -> list[Outcome]:
    return [_cleaner(raw) for raw in chunk]
