"""Tests run on two cores side by side: one thread per process keeps them from fighting."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a script's background starts us; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
TEMPORARY = Path(tempfile.gettempdir())
IN_TEMPORARY = {path.name for path in TEMPORARY.iterdir()}
if not IS_WORKER:
    for old in TEMPORARY.glob("minillm_tests_*"):  # of failed sessions, which leave theirs to be looked at for a day
        with contextlib.suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > 24 * 3600:
                shutil.rmtree(old, ignore_errors=True)
    # The temporary folder of this session, of its workers and of all programs; removed at the end.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="minillm_tests_")

import filelock
import pytest
import torch

from minillm.inference import samples
from tests import forking_python, pictures

torch.set_num_threads(1)
samples.MAX_NEW_TOKENS = 8  # on a run's page, by models that know nothing

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items):
    """Put what takes longest first: the end of a session is short for all workers then."""
    items.sort(key=lambda item: item.path.parent.name not in ("contracts", "stages"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter, exitstatus):
    """Say where the files of failed tests are, and what is new in the system's temporary folder."""
    if os.environ.get("MINILLM_EXERCISES") == "1":
        return  # exercises leave no files that their reader wants to see
    if exitstatus == pytest.ExitCode.TESTS_FAILED:
        terminalreporter.write_line(f"what the tests wrote is in {tempfile.tempdir}")
    names = {path.name for path in TEMPORARY.iterdir() if not path.name.startswith("minillm_tests_")}
    new = sorted(names - IN_TEMPORARY)
    if new:
        terminalreporter.write_line(f"left in {TEMPORARY}, by a test or by another program: {', '.join(new)}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus):
    if not IS_WORKER and exitstatus != pytest.ExitCode.TESTS_FAILED:
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def pixels():
    """Spare the drawing in all tests but those of the drawing."""
    pictures.draw_pixels()


@pytest.fixture(scope="module")
def real_pictures():
    """Draw pictures as users see them, in a module's tests."""
    pictures.draw()
    yield
    pictures.draw_pixels()


@pytest.fixture
def appears():
    """Return whether words get into a file within 30 s: another process (wandb's) writes it, a moment behind."""

    def wait(words: bytes, path, *, within_s: float = 30) -> bool:
        end = time.monotonic() + within_s
        while words not in path.read_bytes() and time.monotonic() < end:
            time.sleep(0.1)
        return words in path.read_bytes()

    return wait


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Call it with a name and a function that fills a directory: tests in other processes share what it made."""

    def once(name: str, build) -> Path:
        shared = tmp_path_factory.getbasetemp()
        shared = shared.parent if IS_WORKER else shared
        directory = shared / name
        with filelock.FileLock(shared / f"{name}.lock"):
            if not (directory / "built").exists():
                directory.mkdir()
                build(directory)
                (directory / "built").touch()
        return directory

    return once


@pytest.fixture(scope="session")
def python(once) -> str:
    """The path of a Python that has the library imported when it starts; see ``forking_python``."""
    if sys.platform != "linux":
        return sys.executable
    owner = os.getppid() if IS_WORKER else os.getpid()
    return str(once("forking_python", lambda directory: forking_python.start(directory, owner=owner)) / "python")


@pytest.fixture(scope="session")
def torchrun(python):
    """Call it with the number of processes and a program: it runs to its end, and what it printed comes back."""

    def torchrun(n_processes: int, *program: str) -> str:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_processes)]
        process = subprocess.Popen(
            [python, *launcher, "--no-python", python, *program],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its workers; killed, it would leave them
            output, _ = process.communicate(timeout=15)
        assert process.returncode == 0, output[-3000:]
        return output

    return torchrun


@pytest.fixture
def largest_file():
    """Call it with a number of bytes: no file can become larger, which is as near as a test comes to a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
