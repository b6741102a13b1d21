"""Faults as users meet them: signals, kills, full disks, damaged files, other data; and how the next run goes on."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_pretrain
from minillm.checkpoints import directory, lock
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import train_bpe
from minillm.training.run import Run
from tests.contracts.test_resume import assert_same, outcome

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_pretrain.py"
LAST_STEP = 12

# Runs the script as python does, but slowly, so that something can happen in the middle; and its rank 1, if there is
# one, dies without a word before its 6th update.
SLOW = """
import os, runpy, signal, sys, time
from minillm.training.run import Run
update = Run.update
def slow_update(run, step):
    if run.step == 5 and run.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5 if run.step > 4 else 0.0)
    update(run, step)
Run.update = slow_update
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def base(make_world, tmp_path_factory):
    """Data and tokenizer of all tests here, and how a run ends that nothing befell."""
    base = make_world(tmp_path_factory.mktemp("faults"))
    base.slow = base.folder / "slow.py"
    base.slow.write_text(SLOW)
    return base


@pytest.fixture(scope="module")
def whole(base, flags):
    train_pretrain.main(command(base, flags, base.folder / "whole"))
    return outcome(base.folder / "whole")


def command(base, flags, out: Path, *more) -> list[str]:
    """Return the flags of 12 updates of 2 micro-batches, saved at every 4th."""
    argv = ["--data_path", base.text, "--tokenizer_path", base.out / "tokenizer", "--cache_dir", base.folder / "cache"]
    argv += ["--max_seq_len", 24, "--batch_size", 2, "--global_batch_size", 4, "--max_steps", LAST_STEP, *more]
    return [*flags(base), *map(str, argv), "--save_interval", "4", "--log_interval", "1", "--save_dir", str(out)]


@pytest.fixture
def started(base, flags, tmp_path):
    """A slow run in a session of its own, of the Python given; ``started.run`` is its directory."""
    processes = []

    def started(interpreter, *more):
        words = [interpreter, str(base.slow), str(SCRIPT), *command(base, flags, tmp_path, *more)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, env=environment(interpreter), start_new_session=True, **pipes)
        processes.append(process)
        until(lambda: len(read_metrics(tmp_path / "pretrain_32" / "metrics.jsonl")) >= 5, process)
        return process

    started.run = tmp_path / "pretrain_32"
    yield started
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def environment(python: str) -> dict:
    """Return the environment in which ``python`` is the one given."""
    path = f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}


def until(condition, process, *, within_s: float = 60) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def start(base, flags, tmp_path, capsys):
    """Run the script in this process, in a save_dir of its own; return exit code, output and error output."""

    def start(*more, out: Path = tmp_path, **changes):
        capsys.readouterr()
        code = 0
        try:
            train_pretrain.main(command(SimpleNamespace(**(vars(base) | changes)), flags, out, *more))
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            code = "killed"
        shown = capsys.readouterr()
        return SimpleNamespace(code=code, out=shown.out, err=shown.err)

    start.run = tmp_path / "pretrain_32"
    return start


@contextlib.contextmanager
def killed_at(step: int, monkeypatch):
    """End runs without a chance to save before the update that follows ``step``."""
    real = Run.update

    def update(run, *args):
        if run.step == step:
            raise KeyboardInterrupt
        real(run, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", update)
        yield


@pytest.fixture
def killed(start, monkeypatch):
    """A run that ended without a chance to save before its 11th update, with checkpoints of steps 4 and 8."""
    with killed_at(10, monkeypatch):
        assert start().code == 128 + signal.SIGINT
    assert names(start.run / "checkpoints") == ["step-00000004", "step-00000008"]
    return start.run


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def error_of(done) -> str:
    """Return the one line that says what is wrong."""
    assert done.code == 2, done
    (line,) = [line for line in done.err.splitlines() if "error: " in line]
    return line


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != lock.FILE)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


# ---- asked to stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_says_how_to_go_on(started, whole, tmp_path, number, python):
    """A scheduler sends SIGTERM to a run; Ctrl-C in a terminal reaches those processes, too, that prepare its data."""
    is_group = number == signal.SIGINT
    process = started(sys.executable, "--num_workers", "1") if is_group else started(python)
    (os.killpg if is_group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    (line,) = [line for line in err.splitlines() if line.startswith("resume with: ")]
    words = shlex.split(line.removeprefix("resume with: "))
    assert [*words[:2], words[-1]] == ["python", str(SCRIPT), "--from_resume"]
    newest = list_checkpoints(started.run / "checkpoints")[0]
    assert find_damage(newest) is None
    assert f"{number.name}: saved after step {int(newest.name[5:])} of {LAST_STEP}" in err
    assert 5 <= int(newest.name[5:]) < LAST_STEP
    done = subprocess.run(words, env=environment(python), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"resumed from {newest}" in done.stdout
    assert_same(outcome(tmp_path), whole)


def test_one_run_per_directory_and_a_dead_one_is_none(started, start, whole, tmp_path, monkeypatch):
    process = started(sys.executable)
    monkeypatch.setattr(directory, "lock_directory", lambda path: lock.lock_directory(path, patience_s=0.2))
    for more in ([], ["--from_resume"], ["--auto_resume"]):
        line = error_of(start(*more))
        assert f"{start.run} is in use by another run (process {process.pid} on " in line
    assert not (start.run / "earlier-1").exists()
    process.kill()
    process.wait()
    rows = read_metrics(start.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # those refused have written nothing
    assert start("--from_resume").code == 0
    assert_same(outcome(tmp_path), whole)


# ---- begun anew, or gone on with ---------------------------------------------------------------------------------


def test_a_forgotten_from_resume_loses_nothing(killed, start):
    before = content(killed / "checkpoints")
    line = error_of(start())
    assert f"{killed} holds an unfinished run with checkpoints up to step-" in line
    assert content(killed / "checkpoints") == before
    assert start("--overwrite").code == 0
    assert content(killed / "earlier-1" / "checkpoints") == before
    assert read_metrics(killed / "metrics.jsonl")[0]["step"] == 1


def test_auto_resume_begins_and_goes_on(start, whole, tmp_path, monkeypatch):
    with killed_at(6, monkeypatch):
        begun = start("--auto_resume")
    assert begun.code == 128 + signal.SIGINT
    assert "resumed" not in begun.out
    gone_on = start("--auto_resume")
    assert gone_on.code == 0
    assert "resumed from" in gone_on.out
    assert "step 4 of 12" in gone_on.out
    assert not (start.run / "earlier-1").exists()
    assert_same(outcome(tmp_path), whole)


# ---- the disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [250_000, 20_000], ids=["the state does not fit", "the weights do not fit"])
def test_a_disk_that_fills_up_leaves_the_older_checkpoint(killed, start, whole, tmp_path, largest):
    """A limit on the size of files is as near as a test comes to a full disk."""
    before = content(killed / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        line = error_of(start("--from_resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for words in ("cannot write the checkpoint", "step-00000012", "File too large", "MiB are free", "--from_resume"):
        assert words in line
    assert content(killed / "checkpoints") == before
    assert not (killed / "model.safetensors").exists()
    assert start("--from_resume").code == 0
    assert_same(outcome(tmp_path), whole)


def test_too_little_room_is_seen_before_anything_is_written(killed, start, whole, tmp_path, monkeypatch):
    before = content(killed / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**30, used=2**30, free=70 * 2**10))
        line = error_of(start("--from_resume"))
    needed = sum(len(before[f"step-00000008/{name}"]) for name in ("model.safetensors", "training_state.pt")) / 2**20
    assert "No space left on device" in line
    assert "0.1 MiB are free" in line
    assert any(abs(float(word) - needed) <= 0.1 for word in line.split() if word.replace(".", "", 1).isdigit()), line
    assert content(killed / "checkpoints") == before
    assert start("--from_resume").code == 0
    assert_same(outcome(tmp_path), whole)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["model.safetensors", "training_state.pt"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(killed, start, whole, tmp_path, damage, name):
    damage(killed / "checkpoints" / "step-00000008" / name)
    done = start("--from_resume")
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if "is damaged" in line]
    assert f"{killed / 'checkpoints' / 'step-00000008'} is damaged ({name} has " in line
    assert f"resumed from {killed / 'checkpoints' / 'step-00000004'} (step 4 of 12)" in done.out
    assert_same(outcome(tmp_path), whole)


def test_with_all_damaged_nothing_is_touched(killed, start):
    for path in list_checkpoints(killed / "checkpoints"):
        truncate(path / "model.safetensors")
    before = content(killed)
    assert "no intact checkpoint" in error_of(start("--from_resume"))
    assert content(killed) == before


# ---- other data, other settings ----------------------------------------------------------------------------------


def test_other_data_is_refused_with_the_file_that_changed(killed, start, base, tmp_path):
    text = tmp_path / "text.jsonl"
    shutil.copy(base.text, text)
    out = tmp_path / "other"
    assert start(out=out, text=text).code == 0
    before = content(out / "pretrain_32")
    for n_documents in (31, 30):  # one more; then as many as before, but one of them another
        lines = base.text.read_text(encoding="utf-8").splitlines()
        lines[n_documents - 1 :] = ['{"text": "the old dog"}']
        text.write_text("\n".join(lines), encoding="utf-8")
        line = error_of(start("--from_resume", out=out, text=text))
        was, now = line.partition(f"{text}: 30 documents, sha256 ")[2][:16], f"{n_documents} documents, sha256 "
        assert len(was) == 16
        _, _, after = line.partition(f"{was} then, {now}")
        assert after[16:].startswith(" now")
        assert after[:16] != was
    assert content(out / "pretrain_32") == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--num_hidden_layers", "3"], "model's num_hidden_layers: 2 then, 3 now"),
        (["--learning_rate", "0.02"], "learning_rate: 0.0005 then, 0.02 now"),
        (["--weight_decay", "0"], "weight_decay: 0.1 then, 0.0 now"),
        (["--max_steps", "20"], "--max_steps 12 then, 20 now"),
        (["--global_batch_size", "8"], "rows_per_step: 4 then, 8 now"),
        (["--seed", "7", "--grad_clip", "0"], "seed: 42 then, 7 now; grad_clip: 1.0 then, 0.0 now"),
        (["--tokenizer_path", "{other}"], "tokenizer: "),
    ],
)
def test_other_settings_are_refused_and_nothing_is_overwritten(killed, start, tmp_path, change, said):
    if "{other}" in change:
        train_bpe(iter(["an old dog"]), vocab_size=267).save(tmp_path / "another")
        change = [change[0], str(tmp_path / "another")]
    before = content(killed)
    assert "run.yaml" in before
    for more in (["--from_resume"], ["--auto_resume"]):
        line = error_of(start(*change, *more))
        assert said in line
        assert str(killed / "checkpoints" / "step-00000008") in line
        assert content(killed) == before


# ---- numbers -----------------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_stop_the_run_before_they_are_saved(start, whole, tmp_path, monkeypatch):
    real = Run.update

    def poisonous(run, step):
        real(run, step)
        if run.step == 6:
            with torch.no_grad():
                run.model.model.norm.weight[3] = torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", poisonous)
        line = error_of(start())
    (saved,) = start.run.glob("nonfinite-*.pt")
    assert "step 7: loss " in line
    assert str(saved) in line
    assert torch.load(saved, weights_only=True)["step"] == 7
    assert names(start.run / "checkpoints") == ["step-00000004"]
    assert find_damage(start.run / "checkpoints" / "step-00000004") is None
    assert start("--from_resume").code == 0
    assert_same(outcome(tmp_path), whole)


# ---- several ranks -----------------------------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_others_and_any_number_goes_on(base, flags, start, whole, tmp_path, torchrun, python):
    launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python", python]
    argv = [*command(base, flags, tmp_path / "two"), "--batch_size", "1"]
    began = time.monotonic()
    words = [*launcher, str(base.slow), str(SCRIPT), *argv]
    done = subprocess.run(words, env=environment(python), capture_output=True, text=True, timeout=100)
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line and "rank 0 of 2" in line]
    assert "lost the others after step 5" in line
    assert "Traceback (most recent call last)" not in done.stderr.partition("error: ")[0]
    assert names(tmp_path / "two" / "pretrain_32" / "checkpoints") == ["step-00000004"]

    shutil.copytree(tmp_path / "two", tmp_path / "one")
    one = start("--from_resume", out=tmp_path / "one")
    assert one.code == 0
    assert "ranks: 2 then, 1 now" in one.out  # another environment, so the last digits may differ
    output = torchrun(2, str(SCRIPT), *argv, "--from_resume")
    assert "step 4 of 12" in output
    assert "another environment" not in output
    for name in ("one", "two"):
        assert list_checkpoints(tmp_path / name / "pretrain_32" / "checkpoints")[0].name == "step-00000012"
        rows = [json.loads(line) for line in (tmp_path / name / "pretrain_32" / "metrics.jsonl").open()]
        for row, wanted in zip(rows, whole["rows"], strict=True):
            assert row["step"] == wanted["step"]
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
