"""Columns kept on disk: row by row what a model says of the row alone, and never of another model or other data."""

import dataclasses
import errno
import json
import pickle

import numpy as np
import pytest
import torch

from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.errors import UserError
from minillm.model import Transformer
from minillm.objectives import column_cache
from minillm.objectives.column_cache import WithColumns, cached_columns, model_hash

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


def test_another_model_and_other_rows_have_a_place_of_their_own(make):
    """Also for a run that is still reading: it maps its files late, and its workers map them in every epoch."""
    first = make()
    other = make(identity={"weights": "x"}, compute=lambda batch: {"double": batch["input_ids"].float()})
    assert other[0]["double"].tolist() == [0, 1, 2, 3, 4]
    assert first[0]["double"].tolist() == [0, 2, 4, 6, 8]

    class OtherRows(Rows):
        data_hash = Rows.data_hash[:32] + "cd" * 16  # the beginnings agree

    assert len({make(rows).cache for rows in (Rows(), OtherRows())}) == 2


def test_two_at_the_same_time_both_succeed_and_nothing_whole_is_removed(make, tmp_path):
    """The second one begins and ends while the first one computes."""
    inner = []

    def slow(batch):
        if not inner:
            inner.append(make())
        return compute(batch)

    outer = make(compute=slow)
    (place,) = (tmp_path / "cache").iterdir()
    assert place == inner[0].cache == outer.cache
    assert outer[4]["double"].tolist() == inner[0][4]["double"].tolist() == [80, 82, 84, 86, 88, 90, 92]


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


def test_the_hash_of_a_model_sees_its_configuration():
    config = ModelConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = Transformer(config)
    before = model_hash(model)
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    for change in ({"rope_theta": 1e3}, scaled, {"rms_norm_eps": 1e-3}, {"num_attention_heads": 4, "head_dim": 8}):
        model.config = dataclasses.replace(config, **change)
        assert model_hash(model) != before, change
    model.config = dataclasses.replace(config)
    assert model_hash(model) == before


def test_the_hash_of_weights_sees_every_number():
    model = torch.nn.Linear(3, 2)
    before = model_hash(model)
    assert model_hash(model) == before
    with torch.no_grad():
        model.bias[1] += 1e-6
    assert model_hash(model) != before
    assert model_hash(model.to(torch.bfloat16)) != model_hash(model.float())
