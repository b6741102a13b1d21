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


# ---- what a run uses ---------------------------------------------------------------------------------------------


def test_cpu_memory_and_cpu_time_are_those_of_this_process(python):
    code = """
import time
import torch
from minillm import hardware
use = hardware.HardwareUse(torch.device("cpu"))
time.sleep(0.5)
idle = use.row()
held, end = bytearray(b"x") * 2**28, time.process_time() + 0.3
while time.process_time() < end:
    pass
busy = use.row()
print(idle["cpu_percent"], busy["cpu_percent"], busy["cpu_memory_gib"] - idle["cpu_memory_gib"], sorted(busy))
"""
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    idle, busy, held, names = shown.split(maxsplit=3)
    assert float(idle) < 50
    assert float(busy) > float(idle)
    assert float(held) == pytest.approx(0.25, abs=0.02)
    assert names == "['cpu_memory_gib', 'cpu_percent']\n"


def test_a_gpu_is_asked_for_its_own_figures_once_per_row(monkeypatch):
    asked = []

    def answers(value):
        return lambda device: (asked.append(device), value)[1]

    figures = {"memory_allocated": 2**30, "memory_reserved": 2**31, "max_memory_allocated": 3 * 2**29,
               "utilization": 87, "temperature": 64, "power_draw": 312_500}  # fmt: skip
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, answers(value))
    use = hardware.HardwareUse(torch.device("cuda", 3))
    assert asked == []
    row = use.row()
    assert asked == [torch.device("cuda", 3)] * len(figures)
    assert tuple(sorted(row)) == tuple(sorted(hardware.USE))
    assert {name: value for name, value in row.items() if name.startswith("gpu")} == {
        "gpu_memory_gib": 1, "gpu_reserved_gib": 2, "gpu_peak_gib": 1.5, "gpu_percent": 87, "gpu_temperature_c": 64,
        "gpu_power_w": 312.5,
    }  # fmt: skip


def test_what_cannot_be_had_is_left_out_and_not_asked_for_again(monkeypatch):
    """No nvidia-ml-py, or a part of a card, whose use nobody measures."""
    asked = []

    def fails(device):
        asked.append(device)
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    for name in ("utilization", "temperature", "power_draw"):
        monkeypatch.setattr(torch.cuda, name, fails)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 2**30)
    use = hardware.HardwareUse(CUDA)
    rows = [use.row(), use.row()]
    assert len(asked) == 3
    for row in rows:
        assert {"gpu_memory_gib", "gpu_reserved_gib", "gpu_peak_gib"} == {name for name in row if "gpu" in name}
