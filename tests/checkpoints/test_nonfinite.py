"""The stop by itself; within a run it is in ``test_run.py``."""

import math
from types import SimpleNamespace

import pytest
import torch

from minillm.checkpoints.nonfinite import stop_for_nonfinite
from minillm.errors import UserError


def test_the_stop_names_the_step_the_numbers_and_the_file(tmp_path):
    batches = [{"input_ids": torch.arange(6).view(2, 3)}, {"input_ids": torch.ones(1, 1)}]
    run = SimpleNamespace(directory=tmp_path, step=41, ranks=SimpleNamespace(rank=3))
    step = SimpleNamespace(micro_batches=batches, n_targets=8.0)
    with pytest.raises(UserError, match=r"step 42: loss 2\.5, gradient norm inf: .*step-00000042-rank3\.pt"):
        stop_for_nonfinite(run, step, 20.0, math.inf)
    saved = torch.load(tmp_path / "nonfinite-step-00000042-rank3.pt", weights_only=True)
    assert saved["step"] == 42
    for ours, wanted in zip(saved["micro_batches"], batches, strict=True):
        assert torch.equal(ours["input_ids"], wanted["input_ids"])

