"""Ranks and the engine, as far as one process shows them; two processes are in ``tests/contracts/test_engines.py``."""

import pytest
import torch

from minillm.distributed import ranks as ranks_module
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.training.optim import adamw
from minillm.training.step import Step


def test_one_process_is_the_main_rank():
    ranks = Ranks()
    assert (ranks.rank, ranks.world_size, ranks.is_main) == (0, 1, True)
    ranks.start(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert ranks.sum(torch.tensor([2.0])).item() == 2
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.main_rank_first(lambda: 7) == 7
    assert ranks.on_main_rank(lambda: 7) == 7
    ranks.barrier()
    ranks.stop()


def test_main_first_passes_errors_on():
    def fail():
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        Ranks().main_rank_first(fail)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_main_rank_does_alone_the_others_only_hear_of(monkeypatch, rank):
    done, ranks = [], Ranks()
    ranks.rank, ranks.world_size = rank, 2
    monkeypatch.setattr(ranks, "gather", lambda value: [None, None])
    assert ranks.on_main_rank(lambda: done.append(rank) or 7) == (7 if rank == 0 else None)
    assert done == ([0] if rank == 0 else [])
    monkeypatch.setattr(ranks, "gather", lambda value: ["the disk is full", None])
    if rank:
        with pytest.raises(UserError, match="rank 0 failed: the disk is full"):
            ranks.on_main_rank(lambda: done.append(rank))


@pytest.fixture
def two_ranks():
    """Return rank 0 and rank 1 of two, with a store between them and a timeout of half an hour."""
    store, pair = torch.distributed.HashStore(), (Ranks(), Ranks())
    for rank, ranks in enumerate(pair):
        ranks.rank, ranks.world_size, ranks._store, ranks._timeout_s = rank, 2, store, 1800.0
        ranks.gather = lambda value: [None, None]
    return pair


class Clock:
    """A clock that only sleeping moves on."""

    def __init__(self, at_every_sleep):
        self.now, self.at_every_sleep = 0.0, at_every_sleep

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.at_every_sleep(self.now)


def test_the_main_rank_may_work_longer_than_the_timeout(two_ranks, monkeypatch):
    main, other = two_ranks
    told = []

    def main_rank(now):
        if now > len(told) * 600:  # every ten minutes
            told.append(main._store.add("minillm alone 1", 1))
        if now > 3 * 3600:
            main._store.set("minillm alone 1 done", "")

    clock = Clock(main_rank)
    monkeypatch.setattr(ranks_module, "time", clock)
    assert other.on_main_rank(lambda: pytest.fail("rank 1 builds")) is None
    assert clock.now > 3 * 3600


def test_a_main_rank_that_is_silent_is_given_up(two_ranks, monkeypatch):
    clock = Clock(lambda now: None)
    monkeypatch.setattr(ranks_module, "time", clock)
    with pytest.raises(UserError, match="no sign of life for 30 minutes"):
        two_ranks[1].on_main_rank(lambda: None)
    assert 1800 < clock.now < 1810


def test_the_main_rank_gives_signs_of_life_while_it_works(two_ranks, monkeypatch):
    main, other = two_ranks
    monkeypatch.setattr(ranks_module, "HEARTBEAT_S", 0.01)
    for name in ("minillm alone 1", "minillm alone 2"):

        def build(name=name):
            while main._store.add(name, 0) < 3:
                pass
            return "built"

        assert main.on_main_rank(build) == "built"
        assert other.on_main_rank(build) is None  # it is done by now
    assert main.main_rank_first(lambda: "again") == other.main_rank_first(lambda: "again") == "again"


def test_ranks_come_from_the_launcher(monkeypatch):
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks()
    assert (ranks.rank, ranks.local_rank, ranks.world_size, ranks.is_main) == (5, 1, 8, False)


@pytest.fixture
def engine():
    model = torch.nn.Linear(3, 2)
    engine = Engine(Ranks(), torch.device("cpu"))
    assert engine.wrap(model) is model  # one process: nothing to wrap
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
    engine = Engine(Ranks(), torch.device("cpu"))
    engine.wrap(model)
    engine.attach(adamw(model, learning_rate=0.1))
    bias = model.bias.clone()
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.clip(1.0)
    engine.step()
    assert torch.equal(model.bias, bias)


def step_of(engine, n_targets=5.0):
    settings = {"number": 1, "n_tokens": 7, "began": 0.0}
    batches = [{"x": torch.ones(1)}, {"x": torch.zeros(1)}]
    return Step(batches, n_targets=n_targets, engine=engine, **settings)


def test_a_step_tells_the_engine_which_micro_batch_is_last(engine, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "set_last", seen.append)
    step = step_of(engine)
    assert len(step) == 2
    assert [batch["x"].item() for batch in step] == [1, 0]
    assert seen == [False, True]


def test_a_loss_that_counts_other_targets_is_an_error_with_both_numbers(engine, monkeypatch):
    step = step_of(engine, n_targets=5.0)
    monkeypatch.setattr(engine, "backward", lambda loss: None)
    for n in (2.0, 3.0):
        step.backward(torch.tensor(1.5), torch.tensor(n, dtype=torch.float64))
    assert (step.local_loss_sum.item(), step.local_count.item()) == (3.0, 5.0)
    assert step.close(torch.tensor(7.0), added=0.5)
    step.read()
    assert (step.loss_sum, step.grad_norm) == (2.5, 7.0)

    step = step_of(engine, n_targets=5.0)
    step.backward(torch.tensor(1.5), torch.tensor(6.0))
    assert not step.close(torch.tensor(torch.inf))
    with pytest.raises(RuntimeError, match="the losses counted 6 targets, the batches of the step hold 5"):
        step.read()
