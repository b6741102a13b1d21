"""A run's directory is its own: who may write there, when, and what becomes of the run that was there before."""

import hashlib
import json
import os
import signal

import pytest
import torch

import eval_model
import train_lora
import train_pretrain
import train_sft
from minillm.checkpoints.checkpoint import list_checkpoints, load_state
from minillm.distributed.engine import Engine
from minillm.errors import UserError
from minillm.reports import tracking
from minillm.reports.tracking import CLOCK, read_metrics
from minillm.training.run import Run
from minillm.training.step import Step
from tests.foreign.models import make_model

SHORT = ["--batch_size", "2", "--max_seq_len", "24", "--log_interval", "1", "--warmup_ratio", "0"]
LONG = ["--batch_size", "2", "--max_seq_len", "250"]


@pytest.fixture
def pretrain(world, call):
    """Train for 6 updates; return exit code, output and error output."""
    return lambda *more: call(train_pretrain.main, world, "--data_path", world.text, *SHORT, "--max_steps", 6, *more)


@pytest.fixture
def directory(world):
    return world.out / "pretrain_32"


def content(directory) -> dict:
    """Return the hash of every file in a directory, but for the lock."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def fails(*args, **kwargs):
    raise UserError("it failed")


# ---- who may write there -----------------------------------------------------------------------------------------


def test_a_finished_run_is_not_touched_without_being_told(pretrain, directory):
    assert pretrain().code == 0
    before = content(directory)
    done = pretrain()
    assert done.code == 2
    for words in (f"{directory} holds a finished run", "--from_resume", "--overwrite", "--run_name"):
        assert words in done.err
    assert done.err.count("\n") == 1
    assert content(directory) == before
    named = pretrain("--run_name", "second")
    assert named.code == 0
    assert content(directory) == before
    assert (directory.parent / "second" / "config.json").is_file()


def test_an_interrupted_run_is_not_touched_either(pretrain, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", fails)
        assert pretrain("--save_interval", 3).code == 2
    before = content(directory)
    done = pretrain()
    assert (done.code, "an unfinished run with checkpoints up to step-00000003" in done.err) == (2, True)
    assert content(directory) == before


def test_a_start_that_failed_leaves_the_directory_free(pretrain, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Step, "backward", fails)
        assert pretrain().code == 2
    assert pretrain().code == 0
    assert not (directory / "earlier-1").exists()


def test_overwrite_keeps_the_earlier_runs_beside_the_new_one(pretrain, directory, world):
    assert pretrain("--valid_path", world.text_valid, "--save_interval", 3).code == 0
    first = content(directory)
    assert (directory / "best").is_dir()
    done = pretrain("--overwrite", "--seed", 7)
    assert done.code == 0
    assert f"is now in {directory / 'earlier-1'}" in done.out
    assert content(directory / "earlier-1") == first
    assert not (directory / "best").exists()  # this run has not validated
    assert [row["step"] for row in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    second = {name: digest for name, digest in content(directory).items() if not name.startswith("earlier-1/")}
    (directory / "another run").mkdir()
    (directory / "another run" / "diary.txt").write_text("mine")
    assert pretrain("--overwrite").code == 0
    assert content(directory / "earlier-1") == first  # nothing is ever removed
    assert content(directory / "earlier-2") == second
    assert (directory / "another run" / "diary.txt").read_text() == "mine"  # no run makes such a folder


@pytest.mark.parametrize("fault", ["wandb", "first update", "validation data", "a file cannot be moved"])
def test_a_new_start_that_fails_leaves_the_finished_run_as_it_was(pretrain, directory, monkeypatch, fault, tmp_path):
    assert pretrain().code == 0
    before, more = content(directory), ["--overwrite"]
    if fault == "wandb":
        wandb = pytest.importorskip("wandb")
        monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("api_key not configured")))
        more.append("--use_wandb")
    elif fault == "first update":
        monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    elif fault == "validation data":
        (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
        more += ["--valid_path", tmp_path / "bad.jsonl"]
    else:
        monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    done = pretrain(*more)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert done.err.rstrip().count("\n") == 0, done.err
    assert content(directory) == before
    if fault == "wandb":
        assert "api_key not configured" in done.err
        assert "wandb login" in done.err


def test_a_move_that_was_killed_is_completed(pretrain, directory, monkeypatch):
    assert pretrain().code == 0
    first = content(directory)
    rename, moved = os.rename, []

    def killed(source, target):
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(source)
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        assert pretrain("--overwrite").code == 130
    assert "about to be moved" in pretrain().err
    assert pretrain("--overwrite").code == 0
    assert content(directory / "earlier-1") == first


def test_names_of_runs(pretrain, world, call):
    for name in ("../elsewhere", "x" * 300, "two\nlines"):
        assert "must be a plain name" in pretrain("--run_name", name).err
    for name in ("lora", "tokenizer", ".token_cache"):
        assert "this directory has another purpose" in pretrain("--run_name", name).err
    done = call(train_lora.main, world, "--data_path", world.chat, "--run_name", "x", "--lora_name", "y",
                "--from_weight", "", *SHORT)  # fmt: skip
    assert done.code == 2


# ---- longer runs -------------------------------------------------------------------------------------------------


def test_more_steps_name_the_flag_and_extend_goes_on(pretrain, directory):
    flags = ["--lr_scheduler", "constant", "--warmup_ratio", "0.4", "--max_steps"]
    assert pretrain(*flags, 6).code == 0
    done = pretrain(*flags, 10, "--from_resume")
    assert done.code == 2
    for words in ("--max_steps 6 then, 10 now", "--extend", f"--from_weight {directory}"):
        assert words in done.err
    assert "total_steps" not in done.err
    assert pretrain(*flags, 10, "--from_resume", "--extend").code == 0
    rows = [row for row in read_metrics(directory / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["lr"] for row in rows[6:]] == 4 * [rows[5]["lr"]]
    shorter = pretrain(*flags, 4, "--from_resume", "--extend")
    assert (shorter.code, "cannot become shorter" in shorter.err) == (2, True)


@pytest.mark.parametrize(("scheduler", "step", "goes_on"), [("cosine", 4, False), ("wsd", 4, True), ("wsd", 6, False)])
def test_a_schedule_that_has_begun_to_fall_is_not_extended(pretrain, directory, monkeypatch, scheduler, step, goes_on):
    flags = ["--lr_scheduler", scheduler, "--decay_ratio", "0.3", "--save_interval", step, "--max_steps"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", fails)
        pretrain(*flags, 7)
    done = pretrain(*flags, 12, "--from_resume", "--extend")
    assert (done.code == 0) == goes_on, done.err
    if not goes_on:
        assert f"the {scheduler} schedule of a longer run has other learning rates" in done.err
        assert "--from_weight" in done.err


# ---- checkpoints before validations ------------------------------------------------------------------------------


def rows_of(directory) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(directory / "metrics.jsonl")]


@pytest.mark.parametrize("step", [4, 6], ids=["in the middle", "at the end"])
@pytest.mark.parametrize("how", ["error", "signal"])
def test_what_ends_in_a_validation_is_saved_and_validates_again(pretrain, directory, world, monkeypatch, step, how):
    flags = ["--valid_path", world.text_valid, "--eval_interval", 2, "--save_interval", 4 if how == "error" else 0]
    assert pretrain(*flags, "--run_name", "whole").code == 0
    to_device, n_validations, loop = Engine.to_device, step // 2, Run.steps

    runs = []

    def steps(run, loader):
        runs.append(run)
        return loop(run, loader)

    def interrupting(engine, batch):
        if not torch.is_grad_enabled() and runs[0].step == step:
            if how == "error":
                raise torch.OutOfMemoryError("out of memory")
            signal.raise_signal(signal.SIGTERM)
        return to_device(engine, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "steps", steps)
        patch.setattr(Engine, "to_device", interrupting)
        if how == "error":
            with pytest.raises(torch.OutOfMemoryError):
                pretrain(*flags)
        else:
            done = pretrain(*flags)
            assert done.code == 128 + signal.SIGTERM
            assert f"SIGTERM: saved after step {step} of 6" in done.err
    newest = list_checkpoints(directory / "checkpoints")[0]
    assert newest.name == f"step-{step:08d}"
    assert load_state(newest)["counters"]["validation_due"]
    assert sum(row["split"] == "valid" for row in rows_of(directory)) == n_validations - 1
    assert pretrain(*flags, "--from_resume").code == 0
    assert rows_of(directory) == rows_of(directory.parent / "whole")
    best = [(folder / "best" / "model.safetensors").read_bytes() for folder in (directory, directory.parent / "whole")]
    assert best[0] == best[1]


def test_a_validation_that_was_logged_is_not_logged_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "split": split} for step in (1, 2, 3) for split in ("train", "valid")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracking.truncate_metrics(path, after_step=2, without_validation=True)
    assert read_metrics(path) == rows[:3]


# ---- what a model came with --------------------------------------------------------------------------------------


def test_generation_settings_of_a_model_stay(world, call, tmp_path):
    came_with = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [602, 600]}
    base = make_model("qwen2", "qwen2", tmp_path / "base", generation=came_with)
    done = call(train_sft.main, world, "--data_path", world.chat, "--from_weight", base, "--max_steps", 1, *LONG)
    assert done.code == 0, done.err
    saved = json.loads((world.out / "full_sft_32" / "generation_config.json").read_text())
    theirs = json.loads((base / "generation_config.json").read_text())
    assert set(theirs["eos_token_id"]) == {600, 602}
    assert {key: saved[key] for key in theirs} == theirs


def test_files_have_the_mode_of_the_umask(pretrain, directory, world, call):
    assert pretrain("--valid_path", world.text_valid).code == 0
    flags = ["--from_weight", directory, "--data_path", world.chat, "--lora_name", "a", "--max_steps", 1]
    assert call(train_lora.main, world, *flags, *LONG).code == 0
    (world.folder / "new").touch()
    usual = (world.folder / "new").stat().st_mode
    files = list(world.out.rglob("*.safetensors"))
    assert len(files) >= 5
    assert {path.stat().st_mode for path in files} == {usual}


def test_a_named_run_is_found_by_its_name(pretrain, world, call):
    assert pretrain("--run_name", "mine").code == 0
    flags = ["--model_mode", 0, "--prompt", "the", "--temperature", 0, "--max_new_tokens", 2]
    done = call(eval_model.main, world, "--from_weight", "mine", *flags)
    assert done.code == 0, done.err
    assert str(world.out / "mine") in done.out
