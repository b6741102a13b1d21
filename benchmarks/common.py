"""Shared by the benchmarks: sides that take turns in one process, ratios by round, tables, JSON."""

import contextlib
import io
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.precision import autocast
from minillm.training.optim import adamw


class Side:
    """One side of a comparison: a model with its loss and optimizer.

    Args:
        loss: takes a batch and returns the mean loss, for the backward pass.
    """

    def __init__(self, model: nn.Module, loss: Callable, *, device: torch.device, dtype: torch.dtype):
        self.model, self.loss = model.to(device).train(), loss
        self.optimizer = adamw(self.model, learning_rate=1e-4)
        self.device, self.dtype = device, dtype
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.seconds: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> float:
        """Make one optimizer update; return its loss."""
        with autocast(self.device, self.dtype):
            loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()  # waits for the device

    def timed_step(self, batch: dict[str, Tensor]) -> None:
        """Make one update and record its time."""
        began = time.perf_counter()
        self.step(batch)
        self.seconds.append(time.perf_counter() - began)


def turns(names: list[str], round_index: int) -> list[str]:
    """Return the names in the order of this round; the first one changes with each round."""
    shift = round_index % len(names)
    return names[shift:] + names[:shift]


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of each round: whatever slows a whole round down does not change its ratio."""
    return median(above / below for above, below in zip(numerators, denominators, strict=True))


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes of tensors during ``step``, above those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    totals = [event["args"] for event in events]
    start = totals[0]["Total Allocated"] - totals[0]["Bytes"]
    return max(args["Total Allocated"] for args in totals) - start


# Variables of glibc: each block of 64 KiB or more is mapped separately and returned when it is freed, so the resident
# memory of a process is that of its tensors.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError("resident memory is read from /proc/self/status, which this system does not have") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def call_script(main: Callable, flags: dict[str, object]) -> None:
    """Call a script's ``main`` with flags (None: left out), without output; UserError with its output if it fails."""
    argv = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main(argv)
    except SystemExit as stopped:
        raise UserError(f"{main.__module__}.py {' '.join(argv)} ended: {output.getvalue()[-800:]}") from stopped


def over_seeds(trials: list[dict], key: str) -> tuple[float, float] | None:
    """Return mean and standard deviation (0 for one seed) of a figure; None if a run diverged."""
    if any(trial.get("diverged") for trial in trials):
        return None
    values = [trial[key] for trial in trials]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def shown(value: tuple[float, float] | None, form: str = ".4f") -> str:
    """Return mean ± deviation as text."""
    return "diverged" if value is None else f"{value[0]:{form}} ± {value[1]:{form}}"


def format_table(rows: list[list[str]]) -> str:
    """Return rows of cells as text, right-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_json(path: str, content: dict) -> None:
    """Write ``content`` with the machine's description; an empty path writes nothing."""
    if not path:
        return
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"machine": machine, **content}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}; choose another") from error
    print(f"written: {path}")
