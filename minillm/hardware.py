"""The device's peak FLOP/s, which is the denominator of MFU (model FLOPs utilisation), its memory, and its use.

MFU as in Chowdhery et al., PaLM (2022), appendix B: the model's own floating-point operations per second, without
recomputation, over the device's peak.
"""

import ctypes
import functools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# The figures of ``HardwareUse``; every one may be missing.
USE = ("cpu_memory_gib", "cpu_percent", "gpu_memory_gib", "gpu_reserved_gib", "gpu_peak_gib", "gpu_percent",
       "gpu_temperature_c", "gpu_power_w")  # fmt: skip

# Dense peak in FLOP/s for 16-bit and float32 (TF32 off) products, from the vendors' data sheets.
GPU_PEAKS = {
    "H200": (989e12, 67e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12), "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12), "A10": (125e12, 31.2e12), "T4": (65e12, 8.1e12), "V100": (125e12, 15.7e12),
    "4090": (165e12, 82.6e12), "3090": (71e12, 35.6e12),
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak rate in FLOP/s: from the data sheet on a known GPU, measured on a CPU, else None.

    On a CPU a few matrix products are timed, once per process, dtype and number of threads. That takes some hundredths
    of a second; for slow dtypes (bfloat16 without native instructions) only small matrices are timed.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, (half, single) in GPU_PEAKS.items():
            if re.search(rf"\b{key}G?\b", name):  # whole words: an L40 is not an L4; the G is for the A10G
                return single if dtype == torch.float32 else half
        return None
    if device.type != "cpu":
        return None
    return _cpu_flops(dtype, torch.get_num_threads())


@functools.cache
def _cpu_flops(dtype: torch.dtype, n_threads: int) -> float:
    for size in (256, 1024):
        a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(4):  # the first one warms up
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        if min(times) > 2e-3:  # the larger size takes 64 times as long, which is too long
            break
    return 2 * size**3 / min(times)


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the CUDA allocator, or (resident) of this process on a CPU; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class HardwareUse:
    """What this process and its device are doing, for the rows of metrics; ``row`` is called once per row.

    ============================================  =================================================================
    ``cpu_memory_gib``                            resident memory of this process
    ``cpu_percent``                               its CPU time since the last row; 100 is one core, and processes that
                                                  prepare data are not counted
    ``gpu_memory_gib``, ``gpu_reserved_gib``      CUDA memory in tensors now, and held by the allocator
    ``gpu_peak_gib``                              the most in tensors so far
    ``gpu_percent``                               share of the last moment (1/6 to 1 s) in which the GPU computed
    ``gpu_temperature_c``, ``gpu_power_w``        degrees Celsius, watts
    ============================================  =================================================================

    The last three need the package nvidia-ml-py. What the machine does not tell is left out and not asked for again.
    """

    def __init__(self, device: torch.device):
        self._clock = (time.perf_counter(), time.process_time())
        self._readers: dict[str, Callable[[], float]] = {"cpu_memory_gib": _resident_gib}
        if device.type == "cuda":
            cuda = torch.cuda
            self._readers |= {
                "gpu_memory_gib": lambda: cuda.memory_allocated(device) / 2**30,
                "gpu_reserved_gib": lambda: cuda.memory_reserved(device) / 2**30,
                "gpu_peak_gib": lambda: memory_bytes(device) / 2**30,
                "gpu_percent": lambda: cuda.utilization(device),
                "gpu_temperature_c": lambda: cuda.temperature(device),
                "gpu_power_w": lambda: cuda.power_draw(device) / 1000,
            }

    def row(self) -> dict[str, float]:
        """Return the figures that there are, by the names above."""
        before, self._clock = self._clock, (time.perf_counter(), time.process_time())
        seconds, cpu_seconds = (now - then for now, then in zip(self._clock, before, strict=True))
        row = {"cpu_percent": round(100 * cpu_seconds / seconds, 1)} if seconds > 0 else {}
        for name, read in list(self._readers.items()):
            try:
                row[name] = round(float(read()), 3)
            except Exception:  # no such file, no package, no driver, a part of a card: each has errors of its own
                del self._readers[name]
        return row


def _resident_gib() -> float:
    if sys.platform == "linux":
        import resource

        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next allocation; return whether that worked.

    A training step on a CPU frees its activations and soon allocates the same sizes again. By default glibc returns
    large blocks to the system in between, which must then map and zero every page again: thousands of page faults per
    step. The peak memory is the same. Without glibc (macOS, musl) nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold, limit = -1, -3, 1 << 30  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h, bytes
    return bool(mallopt(trim_threshold, limit)) and bool(mallopt(mmap_threshold, limit))
