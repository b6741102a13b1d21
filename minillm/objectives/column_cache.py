"""Columns that a frozen model adds to the rows of a run, computed once and memory-mapped ever after.

What a reference or a teacher says of a row never changes, so it need not be computed in every epoch, and the model need
not be in memory while another is trained. A cache is a directory:

    <column>.bin     the numbers of all rows, one row after the other, without padding
    manifest.json    what it was made from and with (``identity``), and the columns with their sizes

The directory's name is a hash of the rows and of everything else the numbers depend on, so two caches never share a
place. It is whole or absent, and several processes may make the same one at once (``data/cache/atomic_directory.py``).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minillm.data.batches import collate
from minillm.data.cache.atomic_directory import build_directory
from minillm.data.cache.sealed import read_sealed, write_sealed
from minillm.errors import UserError

FORMAT = 2  # raise it when the meaning of the columns changes: older caches are then not looked at
MANIFEST = "manifest.json"
GIB = 2**30


class WithColumns:
    """Rows with the columns of a cache next to their own; everything else is that of ``rows``."""

    def __init__(self, rows, cache: Path):
        self.rows, self.cache = rows, cache
        self.columns = read_sealed(cache / MANIFEST)["columns"]

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "rows":  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.rows, name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        row = dict(self.rows[index])
        for name, column in self.columns.items():
            start, end = self._starts[name][index : index + 2]
            row[name] = self._maps[name][start:end].reshape(-1, *column["shape"])
        return row

    def __getstate__(self) -> dict:  # worker processes map the files again
        return {"rows": self.rows, "cache": self.cache, "columns": self.columns}

    @cached_property
    def _starts(self) -> dict[str, np.ndarray]:
        """Where each row begins in the file of each column, and where the last one ends."""
        widths = {name: int(np.prod(column["shape"], dtype=np.int64)) for name, column in self.columns.items()}
        lengths = {name: np.asarray(column["lengths"]) * widths[name] for name, column in self.columns.items()}
        return {name: np.concatenate([[0], np.cumsum(values)]) for name, values in lengths.items()}

    @cached_property
    def _maps(self) -> dict[str, np.ndarray]:
        return {
            name: np.memmap(self.cache / f"{name}.bin", dtype=column["dtype"], mode="r")
            for name, column in self.columns.items()
        }


def cached_columns(
    rows,
    directory: Path,
    *,
    identity: dict,
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    bytes_per_position: int,
    max_gib: float = 0.0,
    flag: str,
    batch_size: int = 8,
) -> WithColumns:
    """Return ``rows`` with the columns that ``compute`` gives for them, from the cache or computed now.

    Args:
        directory: a folder for caches; that of these rows is called after the hash of rows and identity.
        identity: everything else the numbers depend on, as JSON values: the model's hash, and settings.
        compute: takes a batch (see ``collate``), returns columns (B, T, ...) as wide as ``input_ids``, or as
            ``other_input_ids`` where their name begins with ``other_``.
        bytes_per_position, max_gib: the cache's size is known beforehand and refused above this limit (0: no limit).
        flag: what the place is called on the command line, for messages.

    Raises:
        UserError: the cache is too large; the disk is full.
    """
    key = json.dumps([FORMAT, rows.data_hash, identity], sort_keys=True)
    place = directory / hashlib.sha256(key.encode()).hexdigest()[:32]
    if _is_whole(place):
        return WithColumns(rows, place)
    size = int(rows.lengths.sum()) * bytes_per_position
    if max_gib and size > max_gib * GIB:
        raise UserError(
            f"the cache for {flag} would take {size / 2**20:,.2f} MiB, the limit is {max_gib * 1024:,.2f}: raise "
            f"--max_cache_gib, keep less per position, or do without the cache"
        )

    def write(partial: Path) -> None:
        columns = _write(rows, partial, compute, batch_size, flag)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        write_sealed(partial / MANIFEST, {"identity": identity, "columns": columns, "sizes": sizes})

    try:
        build_directory(place, write=write, is_complete=_is_whole)
    except OSError as error:
        free = shutil.disk_usage(directory.parent if directory.parent.exists() else ".").free
        raise UserError(
            f"cannot write the cache for {flag} to {place}: {error.strerror or error}; it needs "
            f"{size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
        ) from error
    return WithColumns(rows, place)


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all that decides a model's numbers: its configuration, if it has one, and its
    parameters and buffers with their names and dtypes."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(json.dumps(None if config is None else asdict(config), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_whole(place: Path) -> bool:
    try:
        sizes = read_sealed(place / MANIFEST)["sizes"]
        return all((place / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _write(rows, partial: Path, compute: Callable, batch_size: int, flag: str) -> dict:
    """Write the numbers of all rows; return the columns' dtypes, trailing shapes and lengths by row."""
    columns: dict[str, dict] = {}
    files = {}
    try:
        for start in tqdm(range(0, len(rows), batch_size), desc=flag, unit="batch", delay=2, leave=False, disable=None):
            some = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
            with torch.no_grad():
                found = compute(collate(some, rows.fixed_len))
            for name, values in found.items():
                values = values.cpu().numpy()
                if name not in columns:
                    files[name] = (partial / f"{name}.bin").open("wb")
                    columns[name] = {"dtype": values.dtype.name, "shape": list(values.shape[2:]), "lengths": []}
                for row, numbers in zip(some, values, strict=False):
                    n = len(row["other_input_ids" if name.startswith("other_") else "input_ids"])
                    np.ascontiguousarray(numbers[:n]).tofile(files[name])
                    columns[name]["lengths"].append(n)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    finally:
        for file in files.values():
            file.close()
    return columns
