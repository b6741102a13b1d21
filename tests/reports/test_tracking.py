"""metrics.jsonl row by row, its truncation at a resume, and Weights & Biases without a network."""

import builtins
import json
import re
import struct
import time
from pathlib import Path

import pytest

from minillm.errors import UserError
from minillm.reports.tracking import Tracker, duration, rate, read_metrics, truncate_metrics


@pytest.fixture
def tracker(tmp_path):
    """Call it to open a tracker of tmp_path; all are closed at the end."""
    opened = []

    def tracker(*, first_step=0, enabled=True):
        opened.append(Tracker(tmp_path, enabled=enabled, total_steps=9, first_step=first_step, name="toy"))
        opened[-1].begin(after_step=first_step)
        return opened[-1]

    yield tracker
    for one in opened:
        one.close()


def row(step, split="train", **more):
    return {"step": step, "split": split, "loss": 1.0 / step, "lr": 1e-3} | more


def test_rows_are_on_disk_as_soon_as_they_are_logged(tracker, tmp_path):
    one = tracker()
    rows = [row(1), row(2, split="valid", floor=0.1), row(3, note="文")]
    for number, each in enumerate(rows, start=1):
        one.log(each)
        assert read_metrics(tmp_path / "metrics.jsonl") == rows[:number]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_fresh_run_starts_the_file_afresh_and_a_resumed_one_goes_on(tracker, tmp_path):
    one = tracker()
    for step in (2, 4, 5, 6):
        one.log(row(step))
        one.log(row(step, split="valid"))
    tracker(first_step=4).log(row(5, loss=7.0))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in rows] == [
        (2, "train"), (2, "valid"), (4, "train"), (4, "valid"), (5, "train"),
    ]  # fmt: skip
    assert rows[-1]["loss"] == 7.0
    tracker()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2)) + "\n" + json.dumps(row(3))[:-9])
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    truncate_metrics(path, after_step=1)
    assert path.read_text() == json.dumps(row(1)) + "\n"
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_clear_line(tracker, tmp_path):
    one = tracker()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: No space left on device; make room") as error:
        one.log(row(1))
    assert "\n" not in str(error.value)


def test_another_rank_writes_and_prints_nothing(tracker, tmp_path, capsys):
    one = tracker(enabled=False)
    one.start_wandb(project="p", config={}, run_id=None)
    one.log(row(1))
    one.advance()
    one.show(1, epoch=0.5, loss="1")
    one.print("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_a_bar_moves_and_lines_stand_above_it(tracker, capsys, monkeypatch):
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    one = tracker(first_step=4)
    one.advance()
    one.show(5, epoch=0.25, loss="1.5", lr="4e-4")
    one.print("a line above the bar")
    assert (one.bar.n, one.bar.total) == (5, 9)
    one.bar.refresh()
    shown = capsys.readouterr()
    assert shown.out == "a line above the bar\n"
    assert re.search(r"\rtoy: .* 5/9 .*step.*, epoch=0\.25, loss=1\.5, lr=4e-4\]", shown.err)


@pytest.mark.parametrize("terminals", [(), ("stdout",), ("stderr",)])
def test_elsewhere_a_log_interval_is_a_line(tracker, capsys, monkeypatch, terminals):
    for stream in terminals:  # with the other in a file, a bar would end up there or between its lines
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    one = tracker(first_step=4)
    one.advance()
    clock[0] += 20.5  # for one step, and four are left
    one.show(5, epoch=0.25, loss="1.5", lr="4e-4")
    one.print("a line")
    one.close()
    shown = capsys.readouterr()
    assert shown.out == "step 5/9  epoch 0.25  loss 1.5  lr 4e-4  eta 1:22\na line\n"
    assert shown.err == ""


def test_numbers_for_people():
    assert [duration(seconds) for seconds in (0, 59.6, 82, 3599, 3661)] == ["0:00", "1:00", "1:22", "59:59", "1:01:01"]
    rates = {0: "0", 4.94e-4: "4.9e-4", 1e-3: "1e-3", 3e-10: "3e-10", 0.05: "0.05", 10: "10"}
    assert {value: rate(value) for value in rates} == rates


class FakeRun:
    id = "run-7"

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, values, step):
        self.logged.append((values, step))

    def finish(self):
        self.finished = True


def test_what_is_sent_to_wandb(tracker, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    runs, calls = [], []

    def init(**settings):
        calls.append(settings)
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    one = tracker()
    one.start_wandb(project="minillm", config={"a": 1}, run_id=None)
    assert one.run_id == "run-7"
    one.log(row(2, split="valid"))
    assert runs[0].logged == [({"valid/step": 2, "valid/loss": 0.5, "valid/lr": 1e-3}, 2)]
    one.close()
    assert runs[0].finished
    again = tracker(first_step=2)
    again.start_wandb(project="minillm", config={"a": 1}, run_id="run-7")
    assert [(call["id"], call["resume"]) for call in calls] == [(None, None), ("run-7", "allow")]
    assert calls[0]["project"] == "minillm"
    assert calls[0]["dir"] == str(tmp_path)


def test_wandb_offline_leaves_a_run_on_disk(tracker, tmp_path, monkeypatch, appears):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    one = tracker()
    one.start_wandb(project="minillm", config={"seed": 1}, run_id=None)
    one.log(row(1))
    one.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    assert one.run_id in record.name
    assert appears(b"train/loss", record)


def test_a_missing_wandb_names_the_line_that_installs_it(tracker, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--use_wandb needs .*pip install wandb"):
        tracker().start_wandb(project="p", config={}, run_id=None)


def sent_rows(path: Path) -> list[dict]:
    """Return what a run at Weights & Biases was sent, read from its offline log.

    Its format is LevelDB's: after 7 bytes of the file's own, blocks of 32 KiB with records of (checksum, length, type)
    before their bytes; a record that does not fit goes on in the next block.
    """
    from wandb.proto import wandb_internal_pb2

    content, place, whole, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # no room for a header: the block's end is padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture
def offline(tracker, tmp_path, monkeypatch, appears):
    """Call it with a run's id, the step to go on from and rows: they are sent; the id and the log's rows come back."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def offline(run_id, first_step, rows):
        before = set(tmp_path.glob("wandb/offline-run-*"))
        while any(run.name.split("-")[2] >= time.strftime("%Y%m%d_%H%M%S") for run in before):
            time.sleep(0.05)  # a log is called after the second in which it begins
        one = tracker(first_step=first_step)
        one.start_wandb(project="minillm", config={"seed": 1}, run_id=run_id)
        for each in rows:
            one.log(each)
        mark = f"end{len(before)}"
        one.log(row(99, split=mark))
        one.close()
        (log,) = set(tmp_path.glob("wandb/offline-run-*")) - before
        (log,) = log.glob("*.wandb")
        assert appears(f"{mark}/loss".encode(), log)
        rows = sent_rows(log)  # those of one step are one there
        sent = sorted((values["_step"], key.partition("/")[0]) for values in rows for key in values if "loss" in key)
        assert sent.pop() == (99, mark)
        return one.run_id, sent

    return offline


def test_a_run_that_goes_on_is_one_run_at_wandb_with_each_row_once(offline, tmp_path):
    """Twice killed and resumed from step 3: what the first process sent is not even sent again by the third."""
    rows = [row(step, **more) for step in range(1, 8) for more in ({}, {"split": "valid"})][:-1]
    run_id, first = offline(None, 0, rows[:12])  # to step 6
    assert first == [(r["step"], r["split"]) for r in rows[:12]]
    again, second = offline(run_id, 3, rows[6:8])  # killed when it had made step 4 again
    third_id, third = offline(run_id, 3, rows[6:])
    assert run_id == again == third_id
    assert second == []
    assert third == [(7, "train")]
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["split"]) for r in kept[:-1]] == [(r["step"], r["split"]) for r in rows]
    other_id, other = offline(None, 3, rows[6:])  # another run of theirs has nothing yet
    assert other_id != run_id
    assert other == [(r["step"], r["split"]) for r in rows[6:]]
