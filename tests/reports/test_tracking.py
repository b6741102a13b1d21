"""metrics.jsonl row by row, its truncation at a resume, the bar and the lines."""

import json
import re
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
    one.start_trackers(["wandb"], project="p", config={})
    one.log_samples([("a", "b")], 1)
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
