"""Ranks and the engine, as far as one process shows them; two processes are in ``tests/contracts/test_engines.py``."""

import pytest
import torch

from minillm.errors import UserError
from minillm.training.optim import adamw
from minillm.training.parallel import Engine, Ranks, StepBatchesOnDevice


def test_one_process_is_the_main_rank():
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    ranks.start(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert ranks.sum(torch.tensor([2.0])).item() == 2
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.main_first(lambda: 7) == 7
    assert ranks.main_alone(lambda: 7) == 7
    ranks.barrier()
    ranks.stop()


def test_main_first_passes_errors_on():
    def fail():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        Ranks().main_first(fail)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_main_rank_does_alone_the_others_only_hear_of(monkeypatch, rank):
    done, ranks = [], Ranks()
    ranks.rank, ranks.world_size = rank, 2
    monkeypatch.setattr(ranks, "gather", lambda value: [None, None])
    assert ranks.main_alone(lambda: done.append(rank) or 7) == (7 if rank == 0 else None)
    assert done == ([0] if rank == 0 else [])
    monkeypatch.setattr(ranks, "gather", lambda value: ["the disk is full", None])
    if rank:
        with pytest.raises(UserError, match="rank 0 failed: the disk is full"):
            ranks.main_alone(lambda: done.append(rank))


def test_ranks_come_from_the_launcher(monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks()
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main) == (5, 1, 8, False)


@pytest.fixture
def engine():
    model = torch.nn.Linear(3, 2)
    engine = Engine(Ranks(), torch.amp.GradScaler("cpu", enabled=False))
    assert engine.wrap(model, torch.device("cpu")) is model  # one process: nothing to wrap
    assert engine.attach(adamw(model, learning_rate=0.1)) is model
    return engine


def test_backward_adds_up_and_step_clears(engine):
    x = torch.ones(1, 3)
    engine.backward(engine.module(x).sum())
    once = engine.module.weight.grad.clone()
    engine.backward(engine.module(x).sum())
    assert torch.equal(engine.module.weight.grad, 2 * once)
    norm = engine.clip(0.0)
    assert norm.item() == pytest.approx((2 * torch.tensor(8.0).sqrt()).item())  # 6 weights and 2 biases, 2 each
    assert torch.equal(engine.module.weight.grad, 2 * once)  # 0: no clipping
    assert engine.step() is True
    assert engine.module.weight.grad is None


def test_frozen_parameters_are_left_alone():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    engine = Engine(Ranks(), torch.amp.GradScaler("cpu", enabled=False))
    engine.wrap(model, torch.device("cpu"))
    engine.attach(adamw(model, learning_rate=0.1))
    bias = model.bias.clone()
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.clip(1.0)
    engine.step()
    assert torch.equal(model.bias, bias)


def test_step_batches_tell_the_engine_which_is_last(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "set_last", seen.append)
    batches = StepBatchesOnDevice([{"x": torch.ones(1)}, {"x": torch.zeros(1)}], torch.device("cpu"), engine)
    assert len(batches) == 2
    assert [batch["x"].item() for batch in batches] == [1, 0]
    assert seen == [False, True]
