"""Columns kept on disk: row by row what a model says of the row alone, and never of another model or other data."""

import errno
import json
import pickle

import numpy as np
import pytest
import torch

from minillm.data import StepBatches
from minillm.errors import UserError
from minillm.training import column_cache
from minillm.training.column_cache import WithColumns, cached_columns, weights_hash

LENGTHS = [5, 1, 9, 3, 7]


class Rows:
    """Ragged rows, with other rows of another length beside them."""

    fixed_len, max_seq_len, data_hash = None, 9, "ab" * 32
    lengths = np.array(LENGTHS)

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        ids = np.arange(LENGTHS[index]) + 10 * index
        plain = {"input_ids": ids, "targets": ids + 1, "document_ids": np.zeros_like(ids), "position_ids": ids}
        return plain | {"other_input_ids": np.arange(2 + index)}


def compute(batch):
    """Twice the id, its square and cube, and the other row's id halved: of float32, int16 and float16."""
    ids = batch["input_ids"]
    return {
        "double": (2 * ids).float(),
        "powers": torch.stack([ids**2, ids**3], dim=2).to(torch.int16),
        "other_half": (batch["other_input_ids"] / 2).half(),
    }


@pytest.fixture
def make(tmp_path):
    def make(rows=None, identity=None, **settings):
        usual = {"compute": compute, "bytes_per_position": 8, "flag": "--some_cache", "batch_size": 2}
        return cached_columns(rows or Rows(), tmp_path / "cache", identity=identity or {"weights": "w"},
                              **(usual | settings))  # fmt: skip

    return make


def test_every_row_has_its_own_columns(make):
    rows = make()
    assert isinstance(rows, WithColumns)
    assert len(rows) == 5
    assert rows.max_seq_len == 9
    for index in (3, 0, 4, 1, 2):
        row, ids = rows[index], np.arange(LENGTHS[index]) + 10 * index
        assert row["double"].tolist() == (2 * ids).tolist()
        assert row["powers"].tolist() == np.stack([ids**2, ids**3], axis=1).astype(np.int16).tolist()
        assert row["other_half"].tolist() == (np.arange(2 + index) / 2).tolist()
        assert row["input_ids"].tolist() == ids.tolist()


def test_batches_pad_the_columns(make):
    loader = StepBatches(make(), batch_size=3, global_batch_size=6, shuffle=False)
    first, second = loader.step(0, 0)
    assert first["powers"].shape == (3, 9, 2)
    assert first["double"].dtype == torch.float32
    assert first["powers"].dtype == torch.int64
    assert second["double"][2].abs().sum() == 0  # a row of padding
    assert second["input_ids"].shape == (3, second["double"].shape[1])


def test_it_is_computed_once_and_workers_read_it_too(make):
    make()

    def fails(batch):
        raise AssertionError("computed again")

    rows = make(compute=fails)
    copied = pickle.loads(pickle.dumps(rows))
    assert copied[2]["double"].tolist() == rows[2]["double"].tolist()
    loader = StepBatches(rows, batch_size=2, global_batch_size=2)
    plain = [batch["double"] for _, step in loader.iterate(0) for batch in step]
    worked = [batch["double"] for _, step in loader.iterate(0, num_workers=1) for batch in step]
    assert all(torch.equal(a, b) for a, b in zip(plain, worked, strict=True))


def test_another_model_makes_it_anew_or_is_refused(make):
    make()
    with pytest.raises(UserError) as error:
        make(identity={"weights": "x"}, must_fit=True)
    assert all(word in str(error.value) for word in ("--some_cache", "stale", "weights: w then, x now", "remove"))
    rows = make(identity={"weights": "x"}, compute=lambda batch: {"double": batch["input_ids"].float()})
    assert rows[0]["double"].tolist() == [0, 1, 2, 3, 4]
    assert make(identity={"weights": "x"}, must_fit=True)[0]["double"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "list", "a length"])
def test_a_damaged_cache_is_made_anew(make, damage, tmp_path):
    make()
    (place,) = (tmp_path / "cache").iterdir()
    if damage == "cut":
        (place / "double.bin").write_bytes((place / "double.bin").read_bytes()[:-1])
    elif damage == "gone":
        (place / "powers.bin").unlink()
    else:
        manifest = place / "manifest.json"
        whole = manifest.read_text()
        manifest.write_text({"manifest": "{", "list": "[]", "a length": whole.replace(" 9,", " 8,")}[damage])
        assert manifest.read_text() != whole
    assert make()[4]["double"].tolist() == [80, 82, 84, 86, 88, 90, 92]
    assert json.loads((place / "manifest.json").read_text())["identity"] == {"weights": "w"}


def test_a_cache_above_the_limit_is_refused_before_it_is_made(make, tmp_path):
    with pytest.raises(UserError, match="limit is 0"):
        make(max_gib=1e-9)
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_leaves_nothing(make, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(column_cache.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        make()
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_hash_of_weights_sees_every_number():
    model = torch.nn.Linear(3, 2)
    before = weights_hash(model)
    assert weights_hash(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert weights_hash(model) != before
    assert weights_hash(model.to(torch.bfloat16)) != weights_hash(model.float())
