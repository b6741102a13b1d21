"""Exercises of chapter 16: the order of the data, the newest intact checkpoint, and a snapshot."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minillm.checkpoints import checkpoint
from minillm.data import StepBatches
from tests.exercises.kit import exercise, find_the_bug


class Rows(list):
    fixed_len = 4


def library_rows(step, *, n_rows, rows_per_step, seed):
    batches = StepBatches(Rows(range(n_rows)), batch_size=1, global_batch_size=rows_per_step, seed=seed)
    return batches.step_rows(step // batches.steps_per_epoch, step % batches.steps_per_epoch)


def cut(epoch, index, *, n_rows, rows_per_step, seed):
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    return order[index * rows_per_step : (index + 1) * rows_per_step]


def drops_the_rest(step, *, n_rows, rows_per_step, seed):
    n_steps = n_rows // rows_per_step
    return cut(step // n_steps, step % n_steps, n_rows=n_rows, rows_per_step=rows_per_step, seed=seed)


def same_order(step, *, n_rows, rows_per_step, seed):
    n_steps = -(-n_rows // rows_per_step)
    return cut(0, step % n_steps, n_rows=n_rows, rows_per_step=rows_per_step, seed=seed)


def in_file_order(step, *, n_rows, rows_per_step, seed):
    begin = step % -(-n_rows // rows_per_step) * rows_per_step
    return np.arange(begin, min(begin + rows_per_step, n_rows))


def seed_plus_epoch(step, *, n_rows, rows_per_step, seed):
    n_steps = -(-n_rows // rows_per_step)
    order = np.random.default_rng(seed + step // n_steps).permutation(n_rows)
    return order[step % n_steps * rows_per_step :][:rows_per_step]


@exercise(
    "ch16_order",
    solution=library_rows,
    wrong={
        "drops the last rows": (drops_the_rest, "what is left"),
        "the same order each epoch": (same_order, "its own order"),
        "no shuffling": (in_file_order, "permutation"),
        "seed + epoch": (seed_plus_epoch, "seed and epoch"),
    },
)
def test_rows_of_step(candidate):
    settings = {"n_rows": 10, "rows_per_step": 4, "seed": 3}
    for step, message in (
        (0, "the rows of step 0 begin the permutation of [seed, epoch]"),
        (2, "the last step of an epoch holds what is left: two rows of ten"),
        (3, "each epoch has its own order, of seed and epoch"),
        (11, "three steps make an epoch: step 11 is the last of epoch 3"),
    ):
        yours, right = (list(map(int, rows_of(step, **settings))) for rows_of in (candidate, library_rows))
        assert yours == right, message


def library_newest(directory):
    return checkpoint.newest_checkpoint(directory, report=lambda line: None)


def matches(path):
    files = json.loads((path / "manifest.json").read_text())["files"]
    return all(hashlib.sha256((path / n).read_bytes()).hexdigest() == f["sha256"] for n, f in files.items())


def newest_name(directory):
    return max(directory.glob("step-*"), default=None)


def needs_manifest_only(directory):
    return max((path for path in directory.glob("step-*") if (path / "manifest.json").exists()), default=None)


def any_folder(directory):
    return max((path for path in directory.iterdir() if (path / "manifest.json").exists()), default=None)


def gives_up(directory):
    newest = needs_manifest_only(directory)
    return newest if newest is not None and matches(newest) else None


def oldest(directory):
    whole = (path for path in directory.glob("step-*") if (path / "manifest.json").exists() and matches(path))
    return min(whole, default=None)


@exercise(
    "ch16_newest",
    solution=library_newest,
    wrong={
        "trusts the name": (newest_name, "no manifest"),
        "trusts the manifest": (needs_manifest_only, "SHA-256"),
        "any folder": (any_folder, "other folders"),
        "gives up": (gives_up, "the one before"),
        "the oldest": (oldest, "newest"),
    },
)
def test_newest_intact(candidate):
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        assert candidate(directory) is None, "an empty directory has none: None"
        for step in (9, 10, 11):
            checkpoint.save_checkpoint(directory, step, lambda path: None, {"step": step}, keep_last=5)
        assert candidate(directory).name == "step-00000011", "all are intact: the newest"
        shutil.copytree(directory / "step-00000011", directory / "tmp")
        assert candidate(directory).name == "step-00000011", "other folders do not count, also if they are intact"
        (directory / "step-00000011" / "manifest.json").unlink()
        assert candidate(directory).name == "step-00000010", "a folder with no manifest was not finished"
        file = directory / "step-00000010" / checkpoint.STATE_FILE
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        found = candidate(directory)
        assert found is not None, "a damaged checkpoint is passed over; take the one before"
        assert found.name == "step-00000009", "compare the SHA-256 of every file: the size alone is not enough"
        file.unlink()
        assert candidate(directory).name == "step-00000009", "a file that the manifest names may be missing"


def right_snapshot(model):
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def finder(snapshot):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    saved = snapshot(model)
    with torch.no_grad():
        model.weight += 1.0
    assert torch.equal(saved["weight"], before), "training went on, and the snapshot with it"


def right_values(snapshot):
    model = nn.Linear(3, 2)
    assert torch.equal(snapshot(model)["weight"], model.weight)


def right_names(snapshot):
    assert set(snapshot(nn.BatchNorm1d(3))) == set(nn.BatchNorm1d(3).state_dict())


def no_gradient(snapshot):
    assert not any(tensor.requires_grad for tensor in snapshot(nn.Linear(3, 2)).values())


test_find_the_bug = find_the_bug(
    "ch16_bug",
    right=right_snapshot,
    finder=finder,
    hint="it hides until the model changes",
    wrong={"looks at once": right_values, "looks at the names": right_names, "looks for gradients": no_gradient},
)
