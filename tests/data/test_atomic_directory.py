"""Directories that several processes make at once: all succeed, one result, nothing whole is lost."""

import multiprocessing
import os
import socket
import threading
import time

import pytest

from minillm.data.cache import atomic_directory
from minillm.data.cache.atomic_directory import build_directory
from minillm.data.cache.tokenise import tokenise_files

WHOLE = "all of it"


def fill(directory):
    (directory / "content").write_text(WHOLE)


def is_whole(directory):
    return (directory / "content").exists() and (directory / "content").read_text() == WHOLE


def test_the_slower_one_succeeds_and_leaves_the_first_ones_work_alone(tmp_path):
    final = tmp_path / "cache" / "key"

    def slow(directory):
        build_directory(final, write=fill, is_complete=is_whole)  # the faster one, from beginning to end
        slow.inode = final.stat().st_ino
        fill(directory)

    build_directory(final, write=slow, is_complete=is_whole)
    assert is_whole(final)
    assert final.stat().st_ino == slow.inode
    assert list(final.parent.iterdir()) == [final]


def test_a_damaged_one_is_replaced_but_never_what_became_whole_meanwhile(tmp_path):
    final = tmp_path / "key"
    final.mkdir()
    build_directory(final, write=fill, is_complete=is_whole)
    assert is_whole(final)
    (final / "content").write_text("half")
    asked = []

    def repaired_after_the_first_look(directory):
        asked.append(directory)
        if len(asked) == 1:
            (final / "content").write_text(WHOLE)  # by another process, right after it was seen to be damaged
            return False
        return is_whole(directory)

    inode = final.stat().st_ino
    build_directory(final, write=fill, is_complete=repaired_after_the_first_look)
    assert final.stat().st_ino == inode
    assert list(tmp_path.iterdir()) == [final]


def test_a_failure_leaves_nothing(tmp_path):
    def fails(directory):
        fill(directory)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        build_directory(tmp_path / "key", write=fails, is_complete=is_whole)
    assert list(tmp_path.iterdir()) == []


def test_many_threads_at_once(tmp_path):
    barrier, failures = threading.Barrier(6), []

    def build():
        def together(directory):
            fill(directory)
            barrier.wait()  # all are done writing, none has renamed

        try:
            build_directory(tmp_path / "key", write=together, is_complete=is_whole)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=build) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_six_processes_tokenise_one_file(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": text} for text in texts])
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(6), context.Queue()

    def child():
        start.wait()
        (shard,) = tokenise_files(path, tokenizer, kind="text", cache_dir=tmp_path / "c")
        results.put((shard.path.name, shard.n_documents, int(shard.tokens.sum())))

    processes = [context.Process(target=child) for _ in range(6)]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(found) == 1
    assert [place.name for place in (tmp_path / "c").iterdir()] == [found.pop()[0]]


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch, system):
    host = socket.gethostname()
    process = multiprocessing.get_context("fork").Process(target=lambda: None)
    process.start()
    process.join()
    names = {
        "dead": f".key.{host}.{process.pid}.ab.tmp", "alive": f".key.{host}.{os.getpid()}.ab.tmp",
        "elsewhere": f".key.other.{process.pid}.ab.tmp", "odd": f".key.{host}.x.tmp",
        "other key": f".kex.{host}.{process.pid}.ab.tmp",
    }  # fmt: skip
    for name in names.values():
        (tmp_path / name).mkdir()
    if system == "nt":  # there a signal 0 would be Ctrl-C, and age alone decides
        monkeypatch.setattr(atomic_directory.os, "kill", lambda *_: pytest.fail("os.kill on Windows"))
        monkeypatch.setattr(atomic_directory.os, "name", "nt")
        old = time.time() - 2 * atomic_directory.ORPHAN_AGE_S
        os.utime(tmp_path / names["dead"], (old, old))
    atomic_directory.remove_orphans(tmp_path / "key")
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == set(names.values()) - {names["dead"]}
