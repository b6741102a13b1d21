"""Runs a stage in a forked process, which ``torture.py`` ends in many ways.

The parent has imported everything and started no thread, so a child starts in milliseconds instead of seconds, and
may change any global state. It reports events through a pipe, one letter each:

    b   the loop begins: from now on signals are caught        e   the loop has ended
    c   a checkpoint is complete                               k   the child kills itself here
"""

import importlib
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE_S = 120.0  # a run that takes longer counts as hanging
# Where a child may kill itself: what the writer of checkpoints calls, what else is written, and the training itself.
POINTS: dict[str, list[tuple[str, str, str]]] = {
    "os.fsync": [("os", "", "fsync")],
    "os.rename": [("os", "", "rename")],
    "os.replace": [("os", "", "replace")],
    "sha256": [("minillm.checkpoints.checkpoint", "", "sha256")],
    "torch.save": [("torch", "", "save")],
    "save_file": [
        ("minillm.hub.huggingface", "", "save_file"), ("minillm.lora.more.files", "", "save_file"),
        ("minillm.checkpoints.outputs", "", "save_file"), ("minillm.objectives.distill", "", "save_file"),
    ],
    "rmtree": [("shutil", "", "rmtree")],
    "write_text": [("pathlib", "Path", "write_text")],
    "mkdir": [("pathlib", "Path", "mkdir")],
    "truncate_metrics": [
        ("minillm.reports.tracking", "", "truncate_metrics"), ("minillm.reports.watch", "", "truncate_metrics"),
    ],
    "log": [("minillm.reports.tracking", "Tracker", "log")],
    "export": [("minillm.training.run", "Run", "export")],
    "backward": [("minillm.training.step", "Step", "backward")],
    "update": [("minillm.training.run", "Run", "update")],
}  # fmt: skip
IN_LOOP = ("backward", "update")


@dataclass
class Plan:
    """How a run shall end.

    Attributes:
        kind: "" (undisturbed), "time" (SIGKILL from outside), "call" (SIGKILL at a call), "signal" (from outside),
            "own signal" (at a call during the loop).
        point, call, when: for calls: the function, the number of its call, and "before", "half" or "after" it.
        share: for those from outside: when, as a share of the loop's time; negative: before the loop.
        numbers: the signals, one after the other. to_group: the workers get them too.
    """

    kind: str = ""
    point: str = ""
    call: int = 0
    when: str = "before"
    share: float = 0.0
    numbers: tuple[int, ...] = (signal.SIGKILL,)
    to_group: bool = False


@dataclass
class Ended:
    """How a run has ended: its exit code (negative: by that signal), its events, and its output.

    Attributes:
        seconds: from "b" to the end. calls: how often it called each point (where that was counted).
    """

    code: int = 0
    events: str = ""
    out: str = ""
    err: str = ""
    seconds: float = 0.0
    start_seconds: float = 0.0
    hangs: bool = False
    calls: dict[str, int] = field(default_factory=dict)


def run_stage(stage: str, argv: list[str], plan: Plan, place: Path, *, loop_seconds: float = 0.0) -> Ended:
    """Run ``stage`` with ``argv`` in a forked process that ends according to ``plan``; return how it ended.

    Args:
        place: where its output goes: ``place.out``, ``place.err``, ``place.calls``.
        loop_seconds: how long an undisturbed loop takes.
    """
    if is_threaded():
        raise RuntimeError("threads have been started before a fork: their locks would stay locked in the child")
    files = [place.with_suffix(suffix) for suffix in (".out", ".err", ".calls")]
    for file in files:
        file.unlink(missing_ok=True)
    reader, writer = os.pipe()
    began, pid = time.monotonic(), os.fork()
    if not pid:
        _child(stage, argv, plan, writer, files)
    os.close(writer)
    ended = _watch(pid, reader, plan, loop_seconds, began)
    with suppress(ProcessLookupError, PermissionError):  # workers notice only after seconds that their parent has ended
        os.killpg(pid, signal.SIGKILL)
    os.close(reader)
    ended.out, ended.err = (file.read_text(errors="replace") if file.exists() else "" for file in files[:2])
    if files[2].exists():
        ended.calls = json.loads(files[2].read_text())
    return ended


def is_threaded() -> bool:
    """Return whether this process has more than one thread (if the system tells)."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) > 1


def _watch(pid: int, reader: int, plan: Plan, loop_seconds: float, began: float) -> Ended:
    os.set_blocking(reader, False)
    ended, loop_began, code = Ended(), None, None
    numbers = list(plan.numbers) if plan.kind in ("time", "signal") else []
    due = began - plan.share * 0.3 if plan.share < 0 else None
    while code is None:
        select.select([reader], [], [], 0.002)
        ended.events += _read(reader)
        now = time.monotonic()
        if loop_began is None and "b" in ended.events:
            loop_began, ended.start_seconds = now, now - began
            due = due or now + plan.share * loop_seconds
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
        elif numbers and due is not None and now >= due:
            with suppress(ProcessLookupError):
                (os.killpg if plan.to_group else os.kill)(pid, numbers.pop(0))
            due = now + 0.02
        elif now - began > PATIENCE_S:
            os.kill(pid, signal.SIGKILL)
            ended.hangs = True
    ended.code, ended.seconds = code, time.monotonic() - (loop_began or began)
    ended.events += _read(reader)
    return ended


def _read(reader: int) -> str:
    try:
        return os.read(reader, 4096).decode()
    except BlockingIOError:
        return ""


# ---- in the child ------------------------------------------------------------------------------------------------


def _child(stage: str, argv: list[str], plan: Plan, writer: int, files: list[Path]) -> None:
    code = 1
    try:
        os.setsid()  # a group of its own, with its workers
        for number, file in zip((1, 2), files[:2], strict=True):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, number)
            stream = open(number, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - as long as it lives
            setattr(sys, ("", "stdout", "stderr")[number], stream)
        sys.argv = [f"{stage}.py", *argv]
        _tell_events(writer)
        calls = _arm(plan, writer)
        try:
            importlib.import_module(stage).main(argv)
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        files[2].write_text(json.dumps(calls))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_events(writer: int) -> None:
    from minillm import hardware
    from minillm.checkpoints import checkpoint
    from minillm.checkpoints.interrupt import StopSignals
    from minillm.training.run import Run

    # Leave out pictures and the measurement of the processor, which would take most of the time of such a short run.
    sys.modules["matplotlib"] = None
    hardware.peak_flops = lambda *_: None
    enter, steps, save = StopSignals.__enter__, Run.steps, checkpoint.save_checkpoint

    def entered(signals):
        enter(signals)
        os.write(writer, b"b")
        return signals

    def all_steps(run, loader):
        yield from steps(run, loader)
        os.write(writer, b"e")

    def saved(*arguments, **options):
        path = save(*arguments, **options)
        os.write(writer, b"c")
        return path

    StopSignals.__enter__, Run.steps, checkpoint.save_checkpoint = entered, all_steps, saved


def _arm(plan: Plan, writer: int) -> dict[str, int]:
    """Wrap every point to count its calls and to kill the process at the planned one; return the counts."""
    calls, own = dict.fromkeys(POINTS, 0), os.getpid()

    def wrapped(point: str, original: Callable) -> Callable:
        def call(*arguments, **options):
            calls[point] += 1
            if point != plan.point or calls[point] != plan.call or os.getpid() != own:  # a worker of the run
                return original(*arguments, **options)
            if plan.when == "after":
                result = original(*arguments, **options)
            if plan.when == "half":
                _half(point, original, arguments, options)
            os.write(writer, b"k")
            for number in plan.numbers:
                (os.killpg if plan.to_group else os.kill)(os.getpid(), number)
            return result if plan.when == "after" else original(*arguments, **options)

        return call

    for point, places in POINTS.items():
        for module, owner, name in places:
            target = importlib.import_module(module)
            target = getattr(target, owner) if owner else target
            setattr(target, name, wrapped(point, getattr(target, name)))
    return calls


def _half(point: str, original: Callable, arguments: tuple, options: dict) -> None:
    """Do half of a call, as a kill in the middle of it does; calls that write nothing are skipped."""
    if point == "rmtree" and Path(arguments[0]).is_dir():
        inside = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
        for path in inside[: 1 + len(inside) // 2]:
            path.unlink()
    elif point == "write_text":
        content = arguments[1].encode()
        arguments[0].write_bytes(content[: len(content) // 2])
    elif point in ("torch.save", "save_file"):
        original(*arguments, **options)
        target = arguments[1]
        if hasattr(target, "flush"):
            target.flush()
        path = target if isinstance(target, Path) else target.name
        os.truncate(path, os.path.getsize(path) // 2)
    elif point == "log" and arguments[0].enabled:
        line = json.dumps(arguments[1])
        with open(arguments[0].path, "a", encoding="utf-8") as file:
            file.write(line[: len(line) // 2])


# ---- what else may happen to files -------------------------------------------------------------------------------


def damage(checkpoint: Path, rng) -> str:
    """Damage one file of a checkpoint; return a description of the damage."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path, how = rng.choice(files), rng.choice(["a bit flipped", "cut short", "deleted"])
    content = bytearray(path.read_bytes())
    if how == "deleted" or not content:
        path.unlink()
    elif how == "cut short":
        os.truncate(path, rng.randrange(len(content)))
    else:
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    return f"{path.name} {how}"


def litter(checkpoints: Path, rng) -> int:
    """Create directories that look like incomplete checkpoints; return how many."""
    names = {f".step-{rng.randrange(1, 13):08d}.tmp" for _ in range(rng.randrange(1, 4))}
    for name in names:
        shutil.rmtree(checkpoints / name, ignore_errors=True)
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "model.safetensors").write_bytes(rng.randbytes(100))
    return len(names)
