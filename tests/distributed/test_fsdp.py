"""FSDP2 in a group of one process: what shards compute, keep and give back; several ranks are in tests/contracts."""

import errno
import os

import pytest
import torch

from minillm.checkpoints.checkpoint import list_checkpoints
from minillm.checkpoints.interrupt import Interrupted
from minillm.checkpoints.saving import copied
from minillm.distributed.engine import Engine
from minillm.distributed.fsdp import FSDP, read_shards
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.training.optim import adamw
from tests.contracts.harness import CONFIG, MOE_CONFIG, arguments, largest_difference, tiny_model, train
from tests.contracts.test_resume import assert_same

CPU = torch.device("cpu")
CONFIGS = {"dense": CONFIG, "experts": MOE_CONFIG}


@pytest.fixture
def group():
    """A process group of one, which no other test sees."""
    ranks = Ranks()
    ranks.start(CPU, alone=True)
    yield ranks
    ranks.stop()
    assert not torch.distributed.is_initialized()


class Training:
    """A model, its engine and AdamW."""

    def __init__(self, ranks, engine=FSDP, *, config=CONFIG, double=False, scale=0.0, lora=False, other=False):
        model = tiny_model(config=config, double=double)
        if other:  # weights that are not those of the others
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.mul_(0.5).add_(0.01)
        if lora:
            apply_lora(model, rank=3, generator=torch.Generator().manual_seed(1))
        self.engine = engine(ranks, CPU)
        self.engine.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))
        self.model = self.engine.wrap(model)
        self.optimizer = adamw(self.model, learning_rate=1e-2)
        self.engine.attach(self.optimizer)

    def step(self, number: int, *, spoil: bool = False) -> tuple[float, bool]:
        """Train on two micro-batches that depend on ``number``; return the gradients' norm, and if it was applied."""
        draw = torch.Generator().manual_seed(number)
        for index in range(2):
            ids = torch.randint(CONFIG.vocab_size, (2, 9), generator=draw)
            self.engine.set_last(index == 1)
            loss_sum, n_targets = causal_lm_loss(self.model, {"input_ids": ids[:, :-1], "targets": ids[:, 1:]})
            self.engine.backward(loss_sum / n_targets)
        if spoil:
            gradient = next(p.grad for p in self.model.parameters() if p.grad is not None)
            getattr(gradient, "_local_tensor", gradient).view(-1)[3] = torch.inf
        norm = self.engine.clip(0.5).item()
        return norm, self.engine.step()

    def state(self) -> dict:
        """Return all weights and the optimizer's state, whole."""
        return copied({"weights": self.engine.weights(self.model), "optimizer": self.engine.optimizer_state()})


@pytest.mark.parametrize("kind", ["dense", "experts", "adapter"])
def test_steps_are_those_of_the_plain_engine(group, kind):
    settings = {"config": CONFIGS.get(kind, CONFIG), "double": True, "lora": kind == "adapter"}
    plain, sharded = Training(group, Engine, **settings), Training(group, **settings)
    for number in range(3):
        (norm, applied), (wanted, _) = sharded.step(number), plain.step(number)
        assert norm == pytest.approx(wanted, rel=1e-10)
        assert norm > 0.5  # so clipping is at work
        assert applied is True
    ours, wanted = sharded.state(), plain.state()
    assert largest_difference(ours["weights"], wanted["weights"]) < 1e-7
    assert ours["optimizer"]["param_groups"] == wanted["optimizer"]["param_groups"]
    for index, values in wanted["optimizer"]["state"].items():
        for name, tensor in values.items():
            assert ours["optimizer"]["state"][index][name].shape == tensor.shape
            torch.testing.assert_close(ours["optimizer"]["state"][index][name], tensor, rtol=1e-6, atol=1e-12)
    assert sharded.engine.shapes() == plain.engine.shapes()
    assert next(iter(sharded.model.parameters())).dtype == torch.float64


@pytest.mark.parametrize("kind", CONFIGS)
def test_shards_hold_the_moment_of_saving_and_come_back(group, tmp_path, kind):
    first = Training(group, config=CONFIGS[kind])
    first.step(0)
    first.step(1)
    written, wanted = first.engine.save_shards(tmp_path / "shards"), first.state()
    first.step(2)  # while it is written
    written.result()
    groups = first.optimizer.state_dict()["param_groups"]
    assert largest_difference(first.state()["weights"], wanted["weights"]) > 1e-4

    again = Training(group, config=CONFIGS[kind], other=True)
    again.engine.load_shards(tmp_path / "shards", groups)
    assert_same(again.state(), wanted)
    again.step(2)  # the moments are at work, not only there
    assert_same(again.state(), first.state())

    group.stop()  # one process alone reads them whole
    plain = Training(Ranks(), Engine, config=CONFIGS[kind], other=True)
    plain.optimizer.load_state_dict(read_shards(tmp_path / "shards", plain.model, plain.engine.shapes(), groups))
    assert_same(plain.state(), wanted)


@pytest.mark.parametrize("kind", CONFIGS)
def test_whole_weights_and_optimizer_are_dealt_out(group, kind):
    plain, sharded = Training(group, Engine, config=CONFIGS[kind]), Training(group, config=CONFIGS[kind], other=True)
    plain.step(0)
    sharded.engine.load(plain.model, copied(plain.optimizer.state_dict()))
    assert_same(sharded.state(), plain.state())
    plain.step(1)
    sharded.step(1)
    assert largest_difference(sharded.state()["weights"], plain.state()["weights"]) < 1e-5


def test_what_is_frozen_is_not_gathered(group):
    sharded = Training(group, lora=True)
    sharded.step(0)
    state = sharded.state()
    trained = {name for name, parameter in sharded.model.named_parameters() if parameter.requires_grad}
    assert state["weights"].keys() == trained
    assert 0 < len(trained) < len(list(sharded.model.parameters()))
    assert len(state["optimizer"]["state"]) == len(state["weights"])


# ---- float16 -----------------------------------------------------------------------------------------------------


def test_a_loss_scale_changes_nothing_but_overflows_skip_the_step(group):
    plain, scaled = Training(group), Training(group, scale=1024.0)
    for number in range(2):
        assert scaled.step(number)[0] == pytest.approx(plain.step(number)[0], rel=1e-6)
    assert largest_difference(scaled.state()["weights"], plain.state()["weights"]) <= 1e-6
    before = scaled.state()
    norm, applied = scaled.step(2, spoil=True)
    assert (norm, applied, scaled.engine.loss_scale) == (torch.inf, False, 512.0)
    assert_same(scaled.state(), before)
    assert scaled.step(3)[1] is True
    assert scaled.engine.scaler_state()["scale"] == 512.0


@pytest.mark.parametrize(
    ("dtype", "lora", "param_dtype"),
    [
        (torch.float32, False, None),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float16, False, torch.float16),
        (torch.bfloat16, True, None),  # an adapter is float32 whatever the model is
    ],
)
def test_weights_are_gathered_short_and_kept_whole(group, dtype, lora, param_dtype):
    model = tiny_model()
    if lora:
        apply_lora(model, rank=2)
    engine = FSDP(group, CPU, dtype)
    policy = engine._precision(model)
    assert policy.param_dtype == param_dtype
    assert policy.reduce_dtype == (torch.float32 if param_dtype else None)  # sums of many ranks
    engine.wrap(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# ---- in a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "before", "after"), [("experts", "fsdp", "fsdp"), ("dense", "fsdp", "ddp"), ("experts", "ddp", "fsdp")]
)
def test_a_run_goes_on_with_the_other_engine(tmp_path, kind, before, after):
    flags = {"batch_size": 6, "accumulation_steps": 2, "save_interval": 2, "max_steps": 4}
    whole = train(arguments(tmp_path / "whole", **flags), config=CONFIGS[kind])

    def stop(run):
        if run.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(arguments(tmp_path / "cut", parallel=before, **flags), config=CONFIGS[kind], before_update=stop)
    if torch.distributed.is_initialized():  # an error leaves it: the process ends, and does not wait for others
        torch.distributed.destroy_process_group()
    (saved,) = list_checkpoints(next((tmp_path / "cut").rglob("checkpoints")))
    assert (saved / "shards").is_dir() == (before == "fsdp")
    assert (saved / "model.safetensors").is_file() == (before == "ddp")
    again = train(arguments(tmp_path / "cut", parallel=after, from_resume=True, **flags), config=CONFIGS[kind])
    assert not torch.distributed.is_initialized()
    assert [row["step"] for row in again["metrics"]] == [1, 2, 3, 4]
    for row, wanted in zip(again["metrics"], whole["metrics"], strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert largest_difference(again["weights"], whole["weights"]) <= 1e-5


def test_a_full_disk_is_one_clear_error_here_too(tmp_path, monkeypatch):
    real, flags = os.fsync, {"batch_size": 6, "save_interval": 1, "parallel": "fsdp"}

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if "shards" in path and "step-00000002" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    try:
        with pytest.raises(UserError, match="No space left on device"):
            train(arguments(tmp_path, **flags))
    finally:
        torch.distributed.destroy_process_group()
    assert [path.name for path in list_checkpoints(tmp_path / "pretrain_16" / "checkpoints")] == ["step-00000001"]
