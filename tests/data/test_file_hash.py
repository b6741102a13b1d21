"""The hash of a file: read once while the file stays as it is, and read again after every change."""

import hashlib
import os
from pathlib import Path

import pytest

from minillm.data.cache import file_hash as module
from minillm.data.cache.file_hash import file_hash


@pytest.fixture
def reads(monkeypatch):
    """Count how often a file is read."""
    opened = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or plain(path, *a, **k))
    monkeypatch.setattr(module, "SETTLED_S", -1.0)  # files of tests are young
    return opened


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_it_is_read_once(reads, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    reads.clear()
    for _ in range(3):
        assert file_hash(file, memory=tmp_path / "m") == sha(b"one")
    assert reads.count(file) == 1
    assert file_hash(file) == sha(b"one")  # without a memory it is read
    assert reads.count(file) == 2


def test_every_change_is_seen_also_one_that_sets_the_time_back(reads, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    before = os.stat(file)
    assert file_hash(file, memory=tmp_path / "m") == sha(b"one")
    file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(file).st_mtime_ns == before.st_mtime_ns
    assert file_hash(file, memory=tmp_path / "m") == sha(b"two")
    other = tmp_path / "b.jsonl"
    other.write_bytes(b"three")
    other.replace(file)
    assert file_hash(file, memory=tmp_path / "m") == sha(b"three")


def test_a_young_file_is_not_remembered(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    assert file_hash(file, memory=tmp_path / "m") == sha(b"one")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"file": 1, "sha256": 2}', b"\xff"])
def test_a_damaged_memory_is_not_believed(reads, tmp_path, damage):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"one")
    file_hash(file, memory=tmp_path / "m")
    (entry,) = (tmp_path / "m").iterdir()
    entry.write_bytes(damage)
    assert file_hash(file, memory=tmp_path / "m") == sha(b"one")
    assert b"one" not in entry.read_bytes()
    assert len(entry.read_bytes()) > 64  # written again
