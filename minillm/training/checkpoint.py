"""Checkpoints that are whole or not there.

A checkpoint is a directory ``checkpoints/step-00000100/``: a Hugging Face model directory (weights in float32)
plus ``training_state.pt`` and a ``manifest.json`` with the size and SHA-256 of each file. It is written under a
temporary name, synced to disk, and renamed once; so a kill or a full disk leaves the older ones as they were.
Loading takes the newest one whose files match its manifest, and names those that do not.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minillm.errors import UserError

STATE_FILE = "training_state.pt"
MANIFEST_FILE = "manifest.json"


def save_checkpoint(directory: Path, step: int, write_model: Callable[[Path], None], state: dict, *, keep_last: int):
    """Write ``directory/step-%08d`` and remove all but the newest ``keep_last``; return its path.

    Args:
        write_model: writes the model's files into the directory it is given.
        state: tensors and plain values only (it is read back with ``weights_only=True``).

    Raises:
        UserError: the disk is full or not writable; the message says how much was being written.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".{final.name}.tmp-{os.getpid()}"
    try:
        for leftover in directory.glob(".step-*.tmp-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_model(temporary)
        with open(temporary / STATE_FILE, "wb") as file:  # given a path, torch turns a full disk into a RuntimeError
            torch.save(state, file)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(f.relative_to(temporary)): {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
        (temporary / MANIFEST_FILE).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        for path in [*files, temporary / MANIFEST_FILE, temporary]:
            _sync(path)
        if final.exists():  # the same step once more, e.g. after a resume: the new one replaces it
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(directory).free if directory.exists() else 0
        raise UserError(
            f"cannot write the checkpoint {final}: {error.strerror or error}; {free / 2**20:.0f} MiB are free there, "
            f"older checkpoints are untouched; free some space and go on with --from_resume"
        ) from error
    for old in list_checkpoints(directory)[keep_last:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


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
        files = dict(json.loads((path / MANIFEST_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is missing or not readable"
    if STATE_FILE not in files:
        return f"{STATE_FILE} is not listed"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256(file) != expected["sha256"]:
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


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
