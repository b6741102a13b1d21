"""Trackers: a face with a fake behind it, then each real one without a network, its values read back."""

import json
import re
import struct
import sys
import time
from pathlib import Path

import pytest

from minillm.cli import train_arguments
from minillm.errors import UserError
from minillm.reports import trackers
from minillm.reports.tracking import Tracker, read_metrics

NAMES = list(trackers.TRACKERS)
CONFIG = {"seed": 1, "data_path": "文.jsonl", "lora_layers": None, "betas": (0.9, 0.95)}


def row(step, split="train", **more):
    return {"step": step, "split": split, "loss": 1.0 / step, "lr": 1e-3} | more


@pytest.fixture
def open_tracker(tmp_path):
    """Call it with a step and the trackers' names: opens a tracker of tmp_path; all are closed at the end."""
    opened = []

    def open_tracker(*names, first_step=0, run_ids=None, directory="toy_16"):
        path = tmp_path / directory
        path.mkdir(exist_ok=True)
        opened.append(Tracker(path, enabled=True, total_steps=9, first_step=first_step, name="toy"))
        opened[-1].begin(after_step=first_step)
        opened[-1].run_ids = run_ids or {}
        if names:
            opened[-1].start_trackers(list(names), project="minillm", config=CONFIG)
        return opened[-1]

    yield open_tracker
    for one in opened:
        one.close()


# ---- the face ----------------------------------------------------------------------------------------------------


class FakeRun:
    """A tracker that keeps what it gets; ``broken`` raises in ``log``, ``finish`` or at the start."""

    package, advice, made, broken = "fake_tracker", "log in", [], ()

    def __init__(self, directory, *, project, config, run_id):
        if "start" in self.broken:
            raise RuntimeError("api_key not configured\nat line 7")
        if "missing" in self.broken:
            import fake_tracker  # noqa: F401
        self.settings = (directory.name, project, config)
        self.run_id, self.got, self.is_finished = run_id or f"run-{len(self.made)}", [], False
        self.made.append(self)

    def log(self, values, step):
        if "log" in self.broken:
            raise ConnectionError("no route to host")
        self.got.append((step, values))

    def log_samples(self, samples, step):
        self.got.append((step, samples))

    def finish(self):
        if "finish" in self.broken:
            raise TimeoutError
        self.is_finished = True


@pytest.fixture
def fakes(monkeypatch):
    """Two fake trackers, one and other; the class of other is returned, to be broken."""
    made = []
    one, other = (type(name, (FakeRun,), {"made": made}) for name in ("One", "Other"))
    monkeypatch.setattr(trackers, "TRACKERS", {"one": one, "other": other})
    return other


def test_each_tracker_gets_the_numbers_of_a_row_and_the_samples(open_tracker, fakes):
    tracker = open_tracker("one", "other")
    tracker.log(row(2, split="valid", note="文", expert_share=[[1.0]], grad_norm=None))
    tracker.log_samples([("q", "a")], 9)
    tracker.log_samples([], 9)
    tracker.close()
    assert len(fakes.made) == 2
    for run in fakes.made:
        assert run.got == [(2, {"valid/step": 2, "valid/loss": 0.5, "valid/lr": 1e-3}), (9, [("q", "a")])]
        assert run.settings == ("toy_16", "minillm", CONFIG)
        assert run.is_finished
    assert tracker.run_ids == {"one": "run-0", "other": "run-1"}


def test_what_an_earlier_process_has_sent_is_not_sent_twice(open_tracker, fakes):
    """Also not to a tracker that joined late, for the rows that it has."""
    first = open_tracker("one")
    for step in (1, 2, 3, 4):
        first.log(row(step))
    second = open_tracker("one", "other", first_step=2, run_ids=first.run_ids)
    for step in (3, 4, 5):
        second.log(row(step))
    assert [step for step, _ in fakes.made[1].got] == [5]
    assert [step for step, _ in fakes.made[2].got] == [3, 4, 5]
    without = open_tracker(first_step=2, run_ids=second.run_ids)
    assert without.run_ids == {"one": "run-0", "other": "run-2"}  # kept for a later resume with them


def test_one_that_fails_in_mid_run_is_reported_once_and_left_out(open_tracker, fakes, capsys, tmp_path):
    tracker = open_tracker("one", "other")
    tracker.log(row(1))
    fakes.broken = ("log",)
    for step in (2, 3):
        tracker.log(row(step))
    tracker.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: other failed (no route to host)")
    good, bad = fakes.made
    assert [[step for step, _ in run.got] for run in (good, bad)] == [[1, 2, 3], [1]]
    assert good.is_finished
    assert [r["step"] for r in read_metrics(tmp_path / "toy_16" / "metrics.jsonl")] == [1, 2, 3]


def test_one_that_fails_at_the_end_costs_a_warning(open_tracker, fakes, capsys):
    tracker = open_tracker("one", "other")
    fakes.broken = ("finish",)
    tracker.close()
    assert "warning: other failed (TimeoutError)" in capsys.readouterr().out
    assert fakes.made[0].is_finished


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("start", r"^--tracker other: other cannot start \(api_key not configured\); log in, or leave the flag out$"),
        ("missing", r"^--tracker other needs .*pip install fake_tracker  \(or, .*: pip install -e '\.\[track\]'\)$"),
    ],
)
def test_one_that_cannot_start_is_one_line_and_ends_the_others(open_tracker, fakes, broken, message):
    fakes.broken = (broken,)
    with pytest.raises(UserError, match=message):
        open_tracker("one", "other")
    assert fakes.made[0].is_finished


def test_the_flag_knows_every_tracker():
    assert tuple(trackers.TRACKERS) == train_arguments.TRACKERS


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_names_the_line_that_installs_it(open_tracker, monkeypatch, name):
    package = trackers.TRACKERS[name].package
    for module in [module for module in sys.modules if module.split(".")[0] == package or "tensorboard" in module]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^--tracker {name} needs .*: pip install {package}  \(or, "):
        open_tracker(name)


# ---- the real ones, without a network ----------------------------------------------------------------------------


def skip_unless(package):
    return pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")


def records(path: Path, start: int) -> list[bytes]:
    """Return the records of a log in LevelDB's format, as Weights & Biases and SwanLab write them.

    After ``start`` bytes of the file's own: blocks of 32 KiB with records of (checksum, length, type) before their
    bytes; a record that does not fit goes on in the next block.
    """
    content, place, whole, found = path.read_bytes(), start, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # no room for a header: the block's end is padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        if place + 7 + length > len(content):  # it is being written
            break
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(whole)
            whole = b""
    return found


def wait_for_the_next_second(directories) -> None:
    """Some trackers call a log after the second in which it begins."""
    while any(time.strftime("%Y%m%d_%H%M%S") in path.name for path in directories):
        time.sleep(0.05)


class Wandb:
    """Reads the log that Weights & Biases keeps where there is no network."""

    name = "wandb"

    def prepare(self, monkeypatch, tmp_path):
        skip_unless("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")

    def values(self, directory, run_id):
        from wandb.proto import wandb_internal_pb2

        found = {}
        for log in directory.glob(f"wandb/offline-run-*-{run_id}/*.wandb"):
            for content in records(log, 7):
                record = wandb_internal_pb2.Record.FromString(content)
                if record.WhichOneof("record_type") == "history":
                    items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                    for name, value in items.items():
                        found.setdefault(name, []).append((items["_step"], value))
        return found


class SwanLab:
    """Reads the log that SwanLab keeps offline, by its own reader."""

    name = "swanlab"

    def prepare(self, monkeypatch, tmp_path):
        skip_unless("swanlab")
        monkeypatch.setenv("SWANLAB_MODE", "offline")

    def values(self, directory, run_id):
        from swanlab.proto.swanlab.record.v1.record_pb2 import Record
        from swanlab.sdk.internal.core_python.store import DataStoreReader

        found = {}
        for log in directory.glob(f"swanlab/run-*-{run_id}/*.swanlab"):
            reader = DataStoreReader()
            reader.open(log)
            for content in reader:
                record = Record.FromString(content)
                if record.HasField("scalar"):
                    found.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
                elif record.HasField("media"):
                    found.setdefault(record.media.key, []).append((record.media.step, str(record.media)))
            reader.close()
        return found


class TensorBoard:
    """Reads the event files, by TensorBoard's own reader."""

    name = "tensorboard"

    def prepare(self, monkeypatch, tmp_path):
        skip_unless("tensorboard")

    def values(self, directory, run_id):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(directory / "tensorboard" / run_id)).Reload()
        found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        for name in events.Tags()["tensors"]:
            texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(name)]
            found[name.removesuffix("/text_summary")] = texts
        return found


class Trackio:
    """Reads the local database, by Trackio's own functions."""

    name = "trackio"

    def prepare(self, monkeypatch, tmp_path):
        skip_unless("trackio")
        from trackio import sqlite_storage, utils

        for module in (utils, sqlite_storage):  # read once, when the package is imported
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")

    def values(self, directory, run_id):
        from trackio.sqlite_storage import SQLiteStorage

        found = {}
        for entry in SQLiteStorage.get_logs("minillm", run_id):
            for name in entry.keys() - {"step", "timestamp"}:
                found.setdefault(name, []).append((entry["step"], entry[name]))
        return found


def read_back(real, directory, run_id, *, last: str) -> dict:
    """Return what a tracker's run holds, once it holds ``last``: another process (wandb's) writes a moment behind."""
    end = time.monotonic() + 30
    while True:
        values = real.values(directory, run_id)
        if any(name.startswith(last) for name in values) or time.monotonic() > end:
            return values
        time.sleep(0.1)


REAL = [Wandb(), SwanLab(), TensorBoard(), Trackio()]


@pytest.mark.parametrize("real", REAL, ids=NAMES)
def test_a_killed_and_resumed_run_is_one_run_with_each_row_once(real, open_tracker, monkeypatch, tmp_path):
    """Twice killed and resumed from step 3: what the first process sent is not even sent again by the third."""
    real.prepare(monkeypatch, tmp_path)
    directory = tmp_path / "toy_16"
    rows = [row(step, **more) for step in range(1, 8) for more in ({}, {"split": "valid", "accuracy": 0.5})][:-1]
    first = open_tracker(real.name)
    for each in rows[:12]:  # to step 6
        first.log(each)
    first.close()
    run_id = first.run_ids[real.name]
    for rows_again in (rows[6:8], rows[6:]):
        wait_for_the_next_second([*directory.glob("wandb/*"), *directory.glob("swanlab/*")])
        again = open_tracker(real.name, first_step=3, run_ids={real.name: run_id})
        assert again.run_ids[real.name] == run_id
        for each in rows_again:
            again.log(each)
        if rows_again[-1] is rows[-1]:
            again.log_samples([("你好 <b>", "an answer\n```x```"), ("q", "")], 7)
        again.close()
    values = read_back(real, directory, run_id, last="samples")
    for split in ("train", "valid"):
        wanted = [(r["step"], r["loss"]) for r in rows if r["split"] == split]
        assert sorted(values[f"{split}/loss"]) == [(step, pytest.approx(loss)) for step, loss in wanted]
    assert [step for step, _ in sorted(values["valid/accuracy"])] == [1, 2, 3, 4, 5, 6]
    assert any(name.startswith("samples") for name in values)


@pytest.mark.parametrize("real", REAL, ids=NAMES)
def test_a_new_run_of_the_same_name_is_another_run(real, open_tracker, monkeypatch, tmp_path):
    real.prepare(monkeypatch, tmp_path)
    directory, run_ids = tmp_path / "toy_16", []
    for loss in (1.0, 2.0):
        wait_for_the_next_second([*directory.glob("wandb/*"), *directory.glob("swanlab/*")])
        tracker = open_tracker(real.name)
        tracker.log(row(1, loss=loss))
        tracker.close()
        run_ids.append(tracker.run_ids[real.name])
    assert run_ids[0] != run_ids[1]
    values = [read_back(real, directory, run_id, last="train/loss") for run_id in run_ids]
    assert [each["train/loss"] for each in values] == [[(1, 1.0)], [(1, 2.0)]]


def test_tensorboard_has_a_row_as_soon_as_it_is_logged(open_tracker, monkeypatch, tmp_path):
    """A process that is killed loses nothing that was logged."""
    real = TensorBoard()
    real.prepare(monkeypatch, tmp_path)
    tracker = open_tracker("tensorboard")
    for step in (1, 2):
        tracker.log(row(step, loss=float(step)))
        found = real.values(tmp_path / "toy_16", tracker.run_ids["tensorboard"])
        assert found["train/loss"] == [(n, n) for n in range(1, step + 1)]


def test_what_wandb_is_told(open_tracker, tmp_path, monkeypatch):
    wandb, calls = skip_unless("wandb"), []

    class Run:
        id = "run-7"

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **settings: (calls.append(settings), Run())[1])
    one = open_tracker("wandb")
    open_tracker("wandb", first_step=2, run_ids=one.run_ids)
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("run-7", "allow")]
    assert calls[0]["project"] == "minillm"
    assert calls[0]["dir"] == str(tmp_path / "toy_16")


def test_swanlab_without_an_account_is_one_line(open_tracker, monkeypatch, tmp_path):
    skip_unless("swanlab")
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: SIM115
    with pytest.raises(
        UserError, match=r"^--tracker swanlab: swanlab cannot start \(.*\); run `swanlab login`, or set"
    ):
        open_tracker("swanlab")


def test_swanlab_for_one_machine_needs_its_dashboard(open_tracker, monkeypatch):
    """Without it the package shows an error, goes on, and keeps nothing."""
    skip_unless("swanlab")
    if trackers.find_spec("swanboard") is not None:
        pytest.skip("the dashboard is installed")
    monkeypatch.setenv("SWANLAB_MODE", "local")
    with pytest.raises(UserError, match=re.escape("pip install swanlab[dashboard]")):
        open_tracker("swanlab")


def test_checkpoints_of_earlier_versions_continue_their_run_at_wandb():
    from minillm.training.state import _tracker_run_ids

    assert _tracker_run_ids({"tracker_run_id": "x"}) == {"wandb": "x"}
    assert _tracker_run_ids({"tracker_run_id": None}) == {}
    assert _tracker_run_ids({"tracker_run_ids": {"trackio": "y"}}) == {"trackio": "y"}
