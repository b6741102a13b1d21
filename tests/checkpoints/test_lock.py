"""One run per directory: the lock between processes, and what becomes of it when its holder dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from minillm.checkpoints.lock import FILE, lock_directory
from minillm.errors import UserError

# Takes the lock of a directory, says so, and keeps it: for ever, or for some seconds.
HOLDER = """
import pathlib, sys, time
from minillm.checkpoints.lock import lock_directory
file = lock_directory(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """Call it with seconds: another process then holds the lock of tmp_path for so long."""
    pytest.importorskip("fcntl")
    started = []

    def holder(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(tmp_path), str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "locked\n"
        return started[-1]

    yield holder
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_process_is_refused_and_told_who_has_it(holder, tmp_path):
    other = holder(100)
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        lock_directory(tmp_path, patience_s=0.3)
    assert 0.3 <= time.monotonic() - began < 5
    message = str(error.value)
    today = time.strftime("%Y-")
    for words in (str(tmp_path), f"process {other.pid} on {socket.gethostname()}, since {today}", "--save_dir"):
        assert words in message
    assert "\n" not in message
    with pytest.raises(UserError, match=str(other.pid)):  # being refused has not taken it from its holder
        lock_directory(tmp_path, patience_s=0)


def test_it_is_free_when_its_holder_is_killed(holder, tmp_path):
    other = holder(100)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert json.loads((tmp_path / FILE).read_text())["pid"] == other.pid  # its file is left, and is no lock
    with lock_directory(tmp_path, patience_s=0) as file:
        said = json.loads((tmp_path / FILE).read_text())
        assert (said["pid"], said["host"]) == (os.getpid(), socket.gethostname())
        assert not file.closed


def test_a_holder_that_ends_within_the_patience_is_waited_for(holder, tmp_path):
    holder(1.0)
    with lock_directory(tmp_path, patience_s=30):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", '{"pid": 1, "ho', "[]", '{"pid": 1}'])
def test_a_file_without_a_holder_is_no_lock(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with lock_directory(tmp_path, patience_s=0):
        assert set(json.loads((tmp_path / FILE).read_text())) == {"pid", "host", "since"}


@pytest.mark.parametrize("content", ["", '{"pid": 1, "ho', "[]"])
def test_a_holder_that_has_not_yet_written_its_name_is_no_crash(holder, tmp_path, content):
    holder(100)
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match="in use by another run: wait"):
        lock_directory(tmp_path, patience_s=0)


def test_closing_gives_it_back(holder, tmp_path):
    lock_directory(tmp_path).close()
    holder(0)  # gets it at once, or it would not say so


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run directory .*file/run: Not a directory; choose ano"):
        lock_directory(tmp_path / "file" / "run")
    lock_directory(tmp_path / "new" / "run").close()  # one that is not there is made
