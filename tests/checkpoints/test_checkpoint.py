"""Checkpoints are whole or absent, whatever happens while they are written."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from minillm.checkpoints.checkpoint import (
    find_damage,
    list_checkpoints,
    load_state,
    newest_checkpoint,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
)
from minillm.errors import UserError


def write_model(path):
    (path / "model.safetensors").write_bytes(bytes(range(256)) * 37)
    (path / "nested").mkdir()
    (path / "nested" / "config.json").write_text('{"a": 1}')


@pytest.fixture
def save(tmp_path):
    """Write a checkpoint of a step; return its path."""
    directory = tmp_path / "checkpoints"

    def save(step, *, write=write_model, state=None, keep_last=9):
        state = {"step": step, "tensor": torch.arange(5.0) * step} if state is None else state
        return save_checkpoint(directory, step, write, state, keep_last=keep_last)

    save.directory = directory
    return save


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_written_comes_back(save):
    path = save(7)
    assert path.name == "step-00000007"
    assert names(path) == ["manifest.json", "model.safetensors", "nested", "training_state.pt"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert set(manifest["files"]) == {"model.safetensors", "nested/config.json", "training_state.pt"}
    assert manifest["files"]["model.safetensors"]["bytes"] == 256 * 37
    assert find_damage(path) is None
    state = load_state(path)
    assert state["step"] == 7
    assert torch.equal(state["tensor"], torch.arange(5.0) * 7)
    assert names(save.directory) == ["step-00000007"]  # and no temporary


def test_only_the_newest_are_kept_and_found(save):
    for step in (5, 90, 100, 1000):
        save(step, keep_last=2)
    assert names(save.directory) == ["step-00000100", "step-00001000"]
    assert [path.name for path in list_checkpoints(save.directory)] == ["step-00001000", "step-00000100"]
    assert newest_checkpoint(save.directory).name == "step-00001000"


def test_a_step_saved_again_is_replaced(save):
    save(3, state={"v": 1})
    assert load_state(save(3, state={"v": 2})) == {"v": 2}
    assert names(save.directory) == ["step-00000003"]


def test_no_checkpoints_at_all(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fills_the_disk_at_the_state(path):
    """The state then goes to a device that is really full: what torch makes of that is part of the question."""
    write_model(path)
    (path / "training_state.pt").symlink_to("/dev/full")


def fails_halfway(path):
    (path / "model.safetensors").write_bytes(b"half")
    no_space()


@pytest.mark.parametrize(
    "broken",
    ["the model", "the state", "a full device", "the manifest", "the sync", "the rename"],
)
def test_a_full_disk_is_a_clear_error_and_leaves_the_older_ones(save, monkeypatch, broken):
    save(1)
    save(2)
    write = write_model
    if broken == "the model":
        write = fails_halfway
    elif broken == "the state":
        monkeypatch.setattr(torch, "save", no_space)
    elif broken == "a full device":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        write = fills_the_disk_at_the_state
    elif broken == "the manifest":
        monkeypatch.setattr("pathlib.Path.write_text", no_space)
        write = lambda path: (path / "model.safetensors").write_bytes(b"whole")  # noqa: E731
    elif broken == "the sync":
        monkeypatch.setattr(os, "fsync", no_space)
    else:
        monkeypatch.setattr(os, "rename", no_space)
    with pytest.raises(UserError) as error:
        save(3, write=write, keep_last=1)
    message = str(error.value)
    assert "step-00000003" in message
    assert os.strerror(errno.ENOSPC) in message
    free = shutil.disk_usage(save.directory).free / 2**20
    shown = float(message.split(" MiB are free")[0].split()[-1])
    assert shown == pytest.approx(free, rel=0.5)  # other processes write too
    assert "\n" not in message
    monkeypatch.undo()
    assert names(save.directory) == ["step-00000001", "step-00000002"]
    assert newest_checkpoint(save.directory).name == "step-00000002"


def test_a_bug_while_writing_is_no_checkpoint_either(save):
    """Not the user's doing, so not a UserError; but nothing half-written may be taken for a checkpoint."""
    save(1)

    def stumbles(path):
        write_model(path)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save(2, write=stumbles)
    assert list_checkpoints(save.directory)[0].name == "step-00000001"
    save(3)
    assert names(save.directory) == ["step-00000001", "step-00000003"]  # the next save cleared what it left


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, write_model, {}, keep_last=1)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    file = path / "training_state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def forget_the_state(path):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"]["training_state.pt"]
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = [
    (truncate, "model.safetensors has 9471 bytes instead of 9472"),
    (flip_a_bit, "training_state.pt has changed"),
    (lambda path: (path / "nested" / "config.json").unlink(), "nested/config.json is missing"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing or not readable"),
    (lambda path: (path / "manifest.json").write_text('{"step": 2, "fil'), "manifest.json is missing or not readable"),
    (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is missing or not readable"),
    (lambda path: (path / "manifest.json").write_text('{"files": 3}'), "manifest.json is missing or not readable"),
    (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json is missing or not readable"),
    (forget_the_state, "training_state.pt is not listed"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(save, damage, words):
    for step in (1, 2, 3):
        save(step)
    for step in (2, 3):
        damage(save.directory / f"step-{step:08d}")
    lines = []
    assert newest_checkpoint(save.directory, report=lines.append).name == "step-00000001"
    assert len(lines) == 2
    assert "step-00000003" in lines[0]
    assert "step-00000002" in lines[1]
    assert all(words in line and "\n" not in line for line in lines), lines


def test_all_damaged_is_none(save):
    truncate(save(1))
    assert newest_checkpoint(save.directory, report=lambda line: None) is None


def test_the_leftover_of_a_killed_process_is_ignored_and_cleared(save):
    save(1)
    leftover = save.directory / ".step-00000002.tmp-99999"
    shutil.copytree(save.directory / "step-00000001", leftover)  # as complete as one can be before the rename
    assert newest_checkpoint(save.directory).name == "step-00000001"
    assert leftover not in list_checkpoints(save.directory)
    save(3)
    assert names(save.directory) == ["step-00000001", "step-00000003"]


def draws():
    """Numbers of every generator; a normal of NumPy's leaves a second one cached in its state."""
    legacy = np.random  # the global generator is the one that is saved
    return [random.random(), random.gauss(0, 1), legacy.normal(), legacy.randint(99), *torch.randn(3).tolist()]


def test_random_states_round_trip_through_a_checkpoint(save):
    seed_everything(5)
    draws()  # one normal drawn, its twin cached
    path = save(1, state={"rng": rng_state()})
    expected = [draws(), draws()]
    seed_everything(6)
    assert draws() != expected[0]
    set_rng_state(load_state(path)["rng"])  # read back with weights_only=True
    assert [draws(), draws()] == expected


def test_seed_everything_decides_every_generator():
    seed_everything(5)
    first = draws()
    seed_everything(5)
    assert draws() == first
    seed_everything(6)
    assert not set(draws()) & set(first)
    seed_everything(2**32 + 5)  # NumPy's limit is 2**32 - 1
    assert draws()[:2] != first[:2]


def test_a_state_that_needs_pickle_is_not_loaded(save):
    path = save(1, state={"object": random.Random(1)})
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_state(path)
