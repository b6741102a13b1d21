"""The stop by itself; within a run it is in ``test_run.py``."""

import math

import pytest
import torch

from minillm.errors import UserError
from minillm.training.endings import stop_for_nonfinite


def test_the_stop_names_the_step_the_numbers_and_the_file(tmp_path):
    batches = [{"input_ids": torch.arange(6).view(2, 3)}, {"input_ids": torch.ones(1, 1)}]
    with pytest.raises(UserError, match=r"step 42: loss 2\.5, gradient norm inf: .*step-00000042-rank3\.pt"):
        stop_for_nonfinite(tmp_path, batches, step=42, rank=3, loss=2.5, grad_norm=math.inf)
    saved = torch.load(tmp_path / "nonfinite-step-00000042-rank3.pt", weights_only=True)
    assert saved["step"] == 42
    for ours, wanted in zip(saved["micro_batches"], batches, strict=True):
        assert torch.equal(ours["input_ids"], wanted["input_ids"])
