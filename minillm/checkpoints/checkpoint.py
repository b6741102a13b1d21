"""Checkpoints that are whole or absent.

A checkpoint is a directory ``checkpoints/step-00000100/``: a Hugging Face model directory (weights in float32)
plus ``training_state.pt`` and a ``manifest.json`` with the size and SHA-256 of each file. It is written under a
temporary name, synced to disk, and renamed once; so a kill or a full disk leaves the older ones as they were.
Loading takes the newest one whose files match its manifest, and names those that do not.
"""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minillm.errors import UserError
from minillm.files import sha256, system_error

STATE_FILE = "training_state.pt"
MANIFEST_FILE = "manifest.json"
DAMAGED = "damaged-"


def save_checkpoint(
    directory: Path,
    step: int,
    write_model: Callable[[Path], None],
    state: dict,
    *,
    keep_last: int,
    n_bytes: int = 0,
    is_begun: bool = False,
) -> Path:
    """Write ``directory/step-%08d`` and remove all but the newest ``keep_last``; return its path.

    Args:
        write_model: writes the model's files into the directory it is given.
        state: tensors and plain values only (it is read back with ``weights_only=True``).
        n_bytes: what all of it will take, about.
        is_begun: ``prepare_directory`` was called before, by ranks that write together.

    Raises:
        UserError: the disk is full or not writable; the message says how much is needed and how much is free.
    """
    final = directory / f"step-{step:08d}"
    temporary = temporary_path(directory, step)
    try:
        if not is_begun:
            prepare_directory(directory, step, n_bytes=n_bytes)
        write_model(temporary)
        with open(temporary / STATE_FILE, "wb") as file:  # given a path, torch turns a full disk into a RuntimeError
            torch.save(state, file)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(f.relative_to(temporary)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
        (temporary / MANIFEST_FILE).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        folders = [path for path in temporary.rglob("*") if path.is_dir()]
        for path in [*files, temporary / MANIFEST_FILE, *folders, temporary]:
            _sync(path)
        if final.exists():  # the same step once more, e.g. after a resume: the new one replaces it
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(directory)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        of_system = system_error(error)
        if of_system is None:
            raise
        raise _no_room(directory, final, of_system, n_bytes) from error
    tidy(directory, step=step, keep_last=keep_last)
    return final


def tidy(directory: Path, *, step: int, keep_last: int) -> None:
    """Remove what killed processes left behind, damaged checkpoints up to ``step``, and all but the newest others."""
    remove_leftovers(directory)
    damaged = [path for path in directory.glob(f"{DAMAGED}step-*") if path.name <= f"{DAMAGED}step-{step:08d}"]
    for old in damaged + list_checkpoints(directory)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)


def rename_damaged(directory: Path, *, newest: Path) -> None:
    """Give those later than ``newest``, which were found damaged, a name that does not count.

    They must not push out those that are whole. They are there until the run has come as far again.
    """
    for path in list_checkpoints(directory):
        if path.name > newest.name:
            aside = path.with_name(DAMAGED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)


def temporary_path(directory: Path, step: int) -> Path:
    """Return where a checkpoint is written until it is whole. A run's directory is locked, so there is but one."""
    return directory / f".step-{step:08d}.tmp"


def prepare_directory(directory: Path, step: int, *, n_bytes: int = 0) -> None:
    """Make the directory of ``temporary_path``, without what a process left there that was killed while it wrote.

    Raises:
        UserError: less than ``n_bytes`` are free; nothing has been written then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    if shutil.disk_usage(directory).free < n_bytes:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise _no_room(directory, directory / f"step-{step:08d}", error, n_bytes)
    temporary_path(directory, step).mkdir()


def remove_leftovers(directory: Path) -> None:
    """Remove what processes left that were killed while they wrote a checkpoint."""
    for leftover in directory.glob(".step-*.tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _no_room(directory: Path, final: Path, error: OSError, n_bytes: int) -> UserError:
    free = shutil.disk_usage(directory).free if directory.exists() else 0
    return UserError(
        f"cannot write the checkpoint {final}: {error.strerror or error}; it needs about {n_bytes / 2**20:.1f} MiB, "
        f"{free / 2**20:.1f} MiB are free there, older checkpoints are untouched; free some space and go on with "
        f"--from_resume"
    )


def newest_checkpoint(directory: Path, *, report: Callable[[str], None] = print) -> Path | None:
    """Return the newest intact checkpoint, or None; damaged ones are named through ``report`` and passed over."""
    for path in list_checkpoints(directory):
        damage = find_damage(path)
        if damage is None:
            return path
        report(f"checkpoint {path} is damaged ({damage}); trying the one before it")
    return None


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories, newest first."""
    return sorted((p for p in directory.glob("step-*") if p.is_dir()), reverse=True)


def find_damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint (missing, truncated or changed file), or None if it is intact."""
    try:
        said = dict(json.loads((path / MANIFEST_FILE).read_text())["files"])
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in said.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return f"{MANIFEST_FILE} is missing or not readable"
    if STATE_FILE not in files:
        return f"{STATE_FILE} is not listed"
    for name, (n_bytes, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != n_bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {n_bytes}"
        if sha256(file) != digest:
            return f"{name} has changed"
    return None


def load_state(path: Path) -> dict:
    """Return the training state of a checkpoint, on the CPU."""
    return torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (dropout draws from torch's)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the legacy global generator
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Return every random generator's state of this process, as tensors and plain values."""
    version, keys, position = random.getstate()
    name, key, pos, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the legacy one is global state
    state = {
        "python": [version, list(keys), position],
        "numpy": [name, key.tolist(), int(pos), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Restore what ``rng_state`` returned."""
    version, keys, position = state["python"]
    random.setstate((version, tuple(keys), position))
    name, key, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), pos, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # it opens no directories; its file system writes names down by itself
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR | os.O_BINARY if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
