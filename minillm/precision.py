"""Mixed precision: weights are float32, matrix products run in a 16-bit dtype, the loss is scaled for float16.

Micikevicius et al., Mixed Precision Training (2018), section 3: master weights in float32 (3.1), loss scaling
(3.2), reductions in float32 (3.3).
"""

import contextlib

import torch

from minillm.errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Return the device that ``--device`` names; ``auto`` prefers cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu or install a CUDA build")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: not available on this machine; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    return device


def choose_dtype(name: str, device: torch.device, *, flag: str = "dtype") -> torch.dtype:
    """Return the dtype that ``--dtype``, or another ``flag``, names for this device.

    ``auto`` is bfloat16 where the device computes it fast (CUDA capability 8.0 and newer, CPUs with
    avx512_bf16 or amx), float16 on older CUDA cards, else float32. float16 on a CPU is refused: it is up to
    a thousand times slower than float32 there.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and cpu_has_fast_bfloat16() else torch.float32
    if name == "float16" and device.type == "cpu":
        raise UserError(f"--{flag} float16 on a CPU is not usable (no fast kernels); use bfloat16 or float32")
    return _DTYPES[name]


def cpu_has_fast_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 natively (avx512_bf16 or amx)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device, dtype: torch.dtype):
    """Return the context for a forward pass: autocast, or a null context for float32 and float64."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Return a GradScaler, which is enabled only for float16."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
