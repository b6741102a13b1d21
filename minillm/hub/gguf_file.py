"""The container of llama.cpp's models: one file with settings, a table of tensors, and their numbers.

    magic "GGUF", version, number of tensors, number of settings
    settings: key, type, value
    table:    name, dimensions (innermost first), number format, offset of each tensor
    padding to a multiple of ``ALIGNMENT``, then the tensors, each padded likewise

All numbers are little-endian. The table stands before the tensors and says where each begins; sizes follow from shapes
and formats, so tensors are read, converted and written one at a time.

Formats: float32, float16, bfloat16, and q8_0, in which 32 neighbours of a row share one float16 scale d and are
whole numbers from -127 to 127: x ≈ d·q, with d = max|x| / 127.
"""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm.errors import UserError
from minillm.files import atomic_file

VERSION = 3
ALIGNMENT = 32
BLOCK = 32  # numbers that share a scale in q8_0
# The format's number in the file, the bytes of a block, and the numbers in a block.
FORMATS = {"f32": (0, 4, 1), "f16": (1, 2, 1), "q8_0": (8, 34, BLOCK), "bf16": (30, 2, 1)}
FLOAT16_MAX = torch.finfo(torch.float16).max

# The types of settings; an array has its elements' type before its length.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9

Value = str | bool | int | float | list[str] | list[int] | list[float]


class StoredTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]  # as in torch, the innermost dimension last
    form: str  # a key of FORMATS
    read: Callable[[], Tensor]  # returns it in float32; called once, when it is its turn

    @property
    def n_bytes(self) -> int:
        """Size in the file, without padding."""
        _, block_bytes, block_len = FORMATS[self.form]
        n_numbers = int(np.prod(self.shape))
        return n_numbers // block_len * block_bytes


def write_gguf(path: Path, settings: dict[str, Value], tensors: list[StoredTensor]) -> None:
    """Write a file atomically: it appears under its name when all of it is on the disk, else nothing is left.

    Raises:
        UserError: a tensor has numbers that are not finite or too large for its format, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            _write(file, settings, tensors)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; it needs "
            f"{sum(tensor.n_bytes for tensor in tensors) / 1e6:,.0f} MB, nothing was left there"
        ) from error


def _write(file: BinaryIO, settings: dict[str, Value], tensors: list[StoredTensor]) -> None:
    file.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(settings)))
    for key, value in settings.items():
        file.write(_string(key) + _typed(value))
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        file.write(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        file.write(struct.pack("<IQ", FORMATS[tensor.form][0], offset))
        offset += _padded(tensor.n_bytes)
    file.write(bytes(_padded(file.tell()) - file.tell()))
    for tensor in tensors:
        numbers = tensor.read()
        if tuple(numbers.shape) != tensor.shape:
            raise ValueError(f"{tensor.name} has shape {tuple(numbers.shape)}, announced was {tensor.shape}")
        file.write(encode(numbers, tensor.form, name=tensor.name))
        file.write(bytes(_padded(tensor.n_bytes) - tensor.n_bytes))


def encode(tensor: Tensor, form: str, *, name: str = "the tensor") -> memoryview:
    """Return the bytes of ``tensor`` in a format.

    Raises:
        UserError: a number is not finite, or too large for the format.
    """
    numbers = tensor.detach().to("cpu", torch.float32).contiguous()
    largest = numbers.abs().max().item() if numbers.numel() else 0.0
    if not np.isfinite(largest):
        raise UserError(f"{name} has numbers that are not finite: nothing was written; use older weights")
    if largest > {"f16": FLOAT16_MAX, "q8_0": 127 * FLOAT16_MAX}.get(form, np.inf):
        raise UserError(f"{name} has the number {largest:.3g}, too large for {form}: choose --dtype bf16 or f32")
    if form == "q8_0":
        return memoryview(quantize_q8_0(numbers.numpy())).cast("B")
    if form == "bf16":  # numpy has no bfloat16: its bits, as whole numbers
        return memoryview(numbers.to(torch.bfloat16).view(torch.int16).numpy()).cast("B")
    return memoryview(numbers.to(torch.float16 if form == "f16" else torch.float32).numpy()).cast("B")


def quantize_q8_0(numbers: np.ndarray) -> np.ndarray:
    """Return the blocks of ``numbers`` (…, n·32) as bytes (blocks, 34): float16 scale d, then 32 int8 q.

    Halves are rounded away from zero, as by C's ``roundf``.
    """
    blocks = numbers.astype(np.float32).reshape(-1, BLOCK)  # (blocks, 32)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)  # (blocks, 1)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    scaled = blocks * inverse
    whole = np.trunc(scaled)
    rounded = whole + np.trunc(2 * (scaled - whole))  # the fraction, doubled, is 1 or more from a half on
    scale_bytes = scales.astype("<f2").view(np.uint8)  # (blocks, 2)
    return np.ascontiguousarray(np.concatenate([scale_bytes, rounded.astype(np.int8).view(np.uint8)], axis=1))


def dequantize_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Return the numbers (blocks, 32) of ``quantize_q8_0``."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)  # (blocks, 1)
    return scales * blocks[:, 2:].view(np.int8).astype(np.float32)


# ---- settings --------------------------------------------------------------------------------------


def _string(text: str) -> bytes:
    content = text.encode("utf-8")
    return struct.pack("<Q", len(content)) + content


def _typed(value: Value) -> bytes:
    """Return type and value; whole numbers are uint32 and in lists int32, others float32."""
    if isinstance(value, list):
        kind = {str: STRING, int: INT32, float: FLOAT32}[type(value[0])]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_elements(value, kind))
    kind = {str: STRING, bool: BOOL, int: UINT32, float: FLOAT32}[type(value)]
    return struct.pack("<I", kind) + b"".join(_elements([value], kind))


def _elements(values: list, kind: int) -> Iterator[bytes]:
    if kind == STRING:
        yield from map(_string, values)
    else:
        letter = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?"}[kind]
        yield struct.pack(f"<{len(values)}{letter}", *values)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
