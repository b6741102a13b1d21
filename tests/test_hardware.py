"""Peak rates from the data sheet or the clock, and memory in use."""

import resource
import subprocess
import sys

import pytest
import torch

from minillm import hardware

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12), ("Tesla V100-SXM2-16GB", 125e12, 15.7e12),
        ("NVIDIA L40S", 362e12, 91.6e12), ("NVIDIA L4", 121e12, 30.3e12), ("NVIDIA A10G", 125e12, 31.2e12),
        ("Tesla T4", 65e12, 8.1e12), ("NVIDIA GeForce RTX 4090", 165e12, 82.6e12), ("Some Card", None, None),
        ("NVIDIA L40", None, None), ("NVIDIA RTX A1000 Laptop GPU", None, None),
    ],
)  # fmt: skip
def test_known_cards_by_name(monkeypatch, name, half, single):
    """A100 must not be read as A10, nor L40S as L4; an unlisted L40 has no figure rather than the L4's."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert hardware.peak_flops(CUDA, torch.bfloat16) == half
    assert hardware.peak_flops(CUDA, torch.float16) == half
    assert hardware.peak_flops(CUDA, torch.float32) == single


def test_an_unknown_kind_of_device_has_no_peak():
    assert hardware.peak_flops(torch.device("mps"), torch.float32) is None


@pytest.mark.parametrize("small, size", [(2**-10, 1024), (0.25, 256)], ids=["quick", "slow"])
def test_the_cpu_is_measured_once(monkeypatch, small, size):
    seconds = [0.5, small, 1.0, 1.0, 0.5, 0.25, 1.0, 1.0]  # of four small products, and four large; the fastest counts
    clock = iter([time for number, each in enumerate(seconds) for time in (number, number + each)])
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(clock))
    hardware._cpu_flops.cache_clear()
    for _ in range(2):
        assert hardware.peak_flops(torch.device("cpu"), torch.float32) == 2 * size**3 / 0.25
    hardware._cpu_flops.cache_clear()


def test_memory_of_this_process_grows_with_what_it_holds(python):
    """In a small process, as what is held must be larger than the peak so far."""
    code = """
import torch
from minillm import hardware
before = hardware.memory_bytes(torch.device("cpu"))
held = bytearray(b"x") * (before + 64 * 2**20)  # written to
print(before, len(held), hardware.memory_bytes(torch.device("cpu")))
"""
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    before, held, after = map(int, shown.split())
    assert before > 20 * 2**20  # bytes, not kilobytes: torch alone is larger
    assert after >= held


def test_memory_on_cuda_is_the_allocators_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 12345)
    assert hardware.memory_bytes(CUDA) == 12345


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_is_kept_and_not_mapped_anew(python):
    """Sixteen times 64 MiB, each freed before the next: by default every one is mapped and zeroed page by page."""
    code = """
import resource, sys, torch
from minillm.hardware import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):  # the heap finds its size
    torch.ones(2**24).sum()
before = faults()
for _ in range(16):
    torch.ones(2**24).sum()
print(faults() - before)
"""
    counts = [
        int(subprocess.run([python, "-c", code, name], capture_output=True, text=True, check=True).stdout)
        for name in ("default", "kept")
    ]
    pages = 2**26 // resource.getpagesize()
    assert counts[1] <= 8 * pages < 15 * pages < counts[0]
