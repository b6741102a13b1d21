"""Arrays in files: larger than memory, and without a surprise when the disk is full."""

import mmap
import os
from pathlib import Path

import numpy as np


def new_array(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return a new array of zeros in a file, whose place on the disk is taken at once.

    Otherwise a full disk would kill the process at a later write, without an error.
    """
    n_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        else:
            file.truncate(n_bytes)
    return np.memmap(path, dtype, "r+", shape=shape)


def open_array(path: Path, shape: tuple[int, ...], dtype) -> np.ndarray:
    """Return the array in a file, for reading; an empty one if the shape says so."""
    return np.memmap(path, dtype, "r", shape=shape) if np.prod(shape) else np.zeros(shape, dtype)


def release_memory(*arrays: np.ndarray) -> None:
    """Give back the memory of the parts of arrays in files that were read or written; their content stays.

    The system would do so too, but only when memory is short, and the process looks large until then.
    """
    for array in arrays:
        mapped = getattr(array, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
