"""Checkpoints written beside the training: from a copy that is one, one at a time, at the right steps, and whole."""

import dataclasses
import os
import threading
import time
from concurrent import futures
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minillm.checkpoints import checkpoint, saving
from minillm.checkpoints.checkpoint import list_checkpoints, load_state, newest_checkpoint, save_checkpoint
from minillm.checkpoints.outputs import WholeModel
from minillm.checkpoints.saving import ModelCopy, Saver, copied, n_bytes_of
from minillm.distributed.engine import changing_state
from minillm.errors import UserError
from minillm.hub.huggingface import load_model
from minillm.lora import apply_lora
from minillm.lora.more.state import trained_state
from minillm.objectives.distill import add_projection
from minillm.training.run import Run
from tests.contracts import pair_runs
from tests.contracts.harness import CONFIG, LORA, MOE_CONFIG, arguments, tiny_model, train
from tests.contracts.test_resume import assert_same

# ---- the copy ----------------------------------------------------------------------------------------------------


def adapted(**settings):
    model = tiny_model()
    apply_lora(model, generator=torch.Generator().manual_seed(1), **settings)
    return model


def with_projection():
    model = tiny_model()
    add_projection(model, 5, seed=3)
    return model


MODELS = {
    "tied": lambda: tiny_model(config=dataclasses.replace(CONFIG, tie_word_embeddings=True)),
    "not tied": lambda: tiny_model(config=dataclasses.replace(CONFIG, tie_word_embeddings=False)),
    "experts": lambda: tiny_model(config=MOE_CONFIG),
    "adapter": lambda: adapted(**LORA),
    "adapter by PiSSA": lambda: adapted(rank=3, init="pissa"),
    "adapter and a layer trained whole": lambda: adapted(rank=2, modules_to_save=["lm_head"]),
    "projection": with_projection,
}


@torch.no_grad()
def logits(model):
    return model(torch.arange(12).view(2, 6))


@torch.no_grad()
def train_a_little(model):
    """Change in place whatever training may change."""
    for tensor in changing_state(model).values():
        tensor.add_(torch.linspace(0.1, 0.7, tensor.numel()).view(tensor.shape))


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_is_equal_and_independent(name):
    model = MODELS[name]()
    twin = ModelCopy(model).model
    assert type(twin) is type(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(twin.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(twin), logits(model))
    trained, before = changing_state(model), copied(changing_state(model))
    assert changing_state(twin).keys() == trained.keys() != set()
    mine = {tensor.data_ptr() for tensor in trained.values()}
    assert not mine & {tensor.data_ptr() for tensor in twin.state_dict().values()}
    first = logits(model)
    train_a_little(model)
    assert not torch.equal(logits(model), first)
    assert torch.equal(logits(twin), first)  # its layers compute with its own weights, adapters too
    assert all(torch.equal(tensor, before[key]) for key, tensor in changing_state(twin).items())


@pytest.mark.parametrize("name", MODELS)
def test_filled_anew_it_is_the_model_of_that_moment(name):
    model = MODELS[name]()
    keeper = ModelCopy(model)
    for _ in range(2):
        train_a_little(model)
        assert keeper.fill(changing_state(model)) is keeper.model
        assert torch.equal(logits(keeper.model), logits(model))
        for key, tensor in model.state_dict().items():
            assert torch.equal(keeper.model.state_dict()[key], tensor), key


def test_what_is_frozen_lies_in_memory_once():
    model = adapted(**LORA)
    twin = dict(ModelCopy(model).model.named_parameters())
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert len(frozen) > 10
    for name, parameter in frozen.items():
        assert twin[name].data_ptr() == parameter.data_ptr()
        assert not twin[name].requires_grad


def test_what_is_tied_stays_tied():
    twin = ModelCopy(MODELS["tied"]()).model
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_copied_tree_shares_nothing():
    parameter = torch.nn.Parameter(torch.arange(3.0))
    tree = {"a": [parameter, {"b": (torch.ones(2), "text", None)}], 3: True}
    twin = copied(tree)
    parameter.data.zero_()
    tree["a"][1]["b"][0].zero_()
    tree["a"].append("later")
    assert twin["a"][0].tolist() == [0, 1, 2]
    assert not twin["a"][0].requires_grad
    assert twin["a"][1]["b"][0].tolist() == [1, 1]
    assert twin["a"][1]["b"][1:] == ("text", None)
    assert len(twin["a"]) == 2
    assert twin[3] is True


def test_bytes_are_those_of_the_tensors():
    tree = [torch.zeros(5, dtype=torch.float64), {"a": (torch.zeros(3, 2, dtype=torch.bfloat16), 7)}, "text", None]
    assert n_bytes_of(tree) == 5 * 8 + 6 * 2
    assert n_bytes_of({}) == n_bytes_of("text") == 0


@pytest.mark.parametrize(
    ("is_main", "is_sharded", "async_save", "from_resume", "is_needed"),
    [
        (True, False, True, False, True),
        (True, False, False, True, False),  # written from the model itself, which waits
        (False, False, True, True, False),
        (True, True, False, False, True),  # no rank has the model whole: it is gathered into the copy
        (False, True, True, False, False),
        (False, True, False, True, True),  # every rank reads the checkpoint
    ],
)
def test_memory_is_taken_only_where_a_copy_is_needed(tmp_path, is_main, is_sharded, async_save, from_resume, is_needed):
    engine = SimpleNamespace(holds_master_weights=not is_sharded, ranks=SimpleNamespace(is_main=is_main))
    saver = Saver(tiny_model(), engine, WholeModel(), tmp_path, is_async=async_save, may_resume=from_resume)
    saver.close()
    assert (saver.copy is not None) == is_needed


# ---- while training goes on --------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """Take note of every moment of saving: its state, as the checkpoint has to hold it, and who writes when.

    ``held(run, step)`` is called in the writing thread before it writes.
    """
    seen = SimpleNamespace(moments={}, writing=0, order=[], held=lambda run, step: None)
    real_save, real_write = Run.save, checkpoint.save_checkpoint

    def save(run):
        seen.run, model = run, run.model
        weights = trained_state(model) if hasattr(run.output, "args") else model.state_dict()
        counters = {name: getattr(run.progress, name) for name in ("step", "tokens", "epoch")}
        state = {"weights": weights, "optimizer": run.engine.optimizer_state(), "rng": checkpoint.rng_state()}
        seen.moments[run.step] = copied(state | {"counters": counters})
        real_save(run)

    def write(directory, step, *args, **options):
        seen.writing += 1
        assert seen.writing == 1
        seen.held(seen.run, step)
        real_write(directory, step, *args, **options)
        seen.order.append(step)
        seen.writing -= 1

    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(checkpoint, "save_checkpoint", write)
    return seen


def until_the_next_update(run, step):
    """The writer is slower than a step: the weights have changed before it begins."""
    end = time.monotonic() + 5
    while run.step == step and step < run.total_steps and time.monotonic() < end:
        time.sleep(0.005)
    assert run.step > step or step == run.total_steps


def a_moment(run, step):
    """The writer is as slow as several steps; where the next save is due, the loop has to wait for it."""
    time.sleep(0.04)


def assert_checkpoints_are_the_moments(directory, moments):
    saved = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(directory / "checkpoints")}
    assert saved.keys() == moments.keys()
    for step, path in saved.items():
        assert checkpoint.find_damage(path) is None
        trained = path / "trained.safetensors"
        weights = load_file(trained) if trained.is_file() else load_model(path, dtype=torch.float32).state_dict()
        state, moment = load_state(path), moments[step]
        assert_same(dict(weights), dict(moment["weights"]), f"step {step}")
        assert_same(state["optimizer"], moment["optimizer"], f"step {step}")
        assert_same(state["rng"], [moment["rng"]], f"step {step}")
        assert {name: state["counters"][name] for name in moment["counters"]} == moment["counters"]


RUNS = {
    "dense": lambda directory, **flags: train(arguments(directory, **flags), dropout=0.2),
    "experts": lambda directory, **flags: train(arguments(directory, **flags), config=MOE_CONFIG),
    "adapter": lambda directory, **flags: pair_runs.train(
        pair_runs.arguments(directory, lora_name="x", **(flags | {"batch_size": 4}))
    ),
}


@pytest.mark.parametrize(("interval", "held"), [(2, until_the_next_update), (1, a_moment)])
@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_is_the_moment_of_saving_bit_for_bit(watched, tmp_path, kind, interval, held):
    watched.held = held
    RUNS[kind](tmp_path, batch_size=3, max_steps=6, save_interval=interval, keep_last=9)
    assert watched.order == list(range(interval, 6, interval))
    assert_checkpoints_are_the_moments(watched.run.directory, watched.moments)


@pytest.mark.parametrize("kind", RUNS)
def test_both_ways_of_saving_write_the_same_files(watched, tmp_path, kind):
    """With --async_save 0 the loop waits: the writer never sees a step that is not its own."""
    found = []
    for async_save in (False, True):
        if not async_save:
            watched.held = lambda run, step: time.sleep(0.02)
        RUNS[kind](tmp_path / str(async_save), batch_size=3, max_steps=5, save_interval=2, async_save=async_save)
        assert_checkpoints_are_the_moments(watched.run.directory, watched.moments)
        (path, *_) = list_checkpoints(watched.run.directory / "checkpoints")
        state = load_state(path)
        del state["counters"]["seconds"], state["window"]["seconds"]
        names = sorted(file.name for file in path.iterdir())
        own = {file.name: file.read_bytes() for file in path.iterdir() if file.name not in OF_THE_STATE}
        found.append({"state": state, "names": names, "files": own})
    assert "model.safetensors" in found[0]["files"] or "trained.safetensors" in found[0]["files"]
    assert_same(found[1], found[0])


OF_THE_STATE = (checkpoint.STATE_FILE, checkpoint.MANIFEST_FILE)  # they hold times


def test_an_error_in_the_thread_ends_the_run_at_its_next_step(watched, tmp_path):
    steps = []

    def fails(run, step):
        if step == 4:
            raise UserError("cannot write the checkpoint: no room")

    def wait_for_the_thread(run):
        steps.append(run.step)
        if run.saver._writing is not None:
            futures.wait([run.saver._writing])

    watched.held = fails
    args = arguments(tmp_path, batch_size=3, max_steps=9, save_interval=2)
    with pytest.raises(UserError, match="no room"):
        train(args, before_update=wait_for_the_thread)
    assert steps[-1] in (3, 4)  # update 5 was the last, or the thread was so quick that update 4 was
    assert [path.name for path in list_checkpoints(watched.run.directory / "checkpoints")] == ["step-00000002"]


@pytest.mark.parametrize("is_async", [True, False])
def test_the_thread_ends_with_its_checkpoint(tmp_path, is_async):
    """A thread that lives on keeps OpenMP's threads, and all later steps are slow."""
    n_alive = []

    def look(run):
        run.saver.wait()
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
        for thread in threads:
            thread.join(timeout=5)
        n_alive.append(sum(thread.is_alive() for thread in threads))

    args = arguments(tmp_path, batch_size=3, max_steps=6, save_interval=2, async_save=is_async)
    train(args, before_update=look, finish=True)
    assert n_alive == [0] * 6
    assert newest_checkpoint(next(tmp_path.rglob("checkpoints"))).name == "step-00000006"


def test_an_error_at_the_last_checkpoint_is_not_lost(watched, tmp_path):
    def fails(run, step):
        if step == 3:
            time.sleep(0.1)
            raise UserError("cannot write the checkpoint: no room")

    watched.held = fails
    with pytest.raises(UserError, match="no room"):
        train(arguments(tmp_path, batch_size=3), finish=True)
    assert not (watched.run.directory / "model.safetensors").exists()


def test_a_run_that_ends_in_an_error_finishes_what_it_is_writing(watched, tmp_path):
    watched.held = lambda run, step: time.sleep(0.3)

    def breaks(run):
        if run.step == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(arguments(tmp_path, batch_size=3, save_interval=2), before_update=breaks)
    assert_checkpoints_are_the_moments(watched.run.directory, watched.moments)
    assert watched.order == [2]


# ---- when --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"save_minutes": 1.5, "save_interval": 0}, [3, 6, 9]),  # steps of 40 s: 90 s are over at the third
        ({"save_minutes": 2, "save_interval": 0}, [3, 6, 9]),  # exactly over is over
        ({"save_minutes": 2.01, "save_interval": 0}, [4, 8]),
        ({"save_minutes": 1.5, "save_interval": 2}, [2, 4, 6, 8]),  # each begins the minutes anew
        ({"save_minutes": 1.5, "save_interval": 5}, [3, 5, 8]),
        ({"save_minutes": 0, "save_interval": 0}, []),
    ],
)
def test_minutes_between_checkpoints(tmp_path, monkeypatch, flags, steps):
    """The clock on the wall is set back all the while, as after a summer or a wrong start."""
    clock = {"monotonic": 1e6, "time": 1.8e9}
    monkeypatch.setattr(saving, "time", SimpleNamespace(**{name: lambda name=name: clock[name] for name in clock}))
    monkeypatch.setattr(time, "time", lambda: clock["time"])

    def pass_time(run):
        clock["monotonic"] += 40
        clock["time"] -= 5000

    train(arguments(tmp_path, batch_size=3, max_steps=10, keep_last=9, **flags), before_update=pass_time)
    saved = list_checkpoints(tmp_path / "pretrain_16" / "checkpoints")
    assert sorted(int(path.name.removeprefix("step-")) for path in saved) == steps


def test_the_newest_is_that_of_the_last_step_whatever_its_files_say(tmp_path, capsys):
    """Copied, or written under a clock that was set back: times in the file system say nothing."""
    flags = {"batch_size": 3, "max_steps": 8, "save_interval": 2}
    train(arguments(tmp_path, keep_last=9, **flags))
    directory = tmp_path / "pretrain_16" / "checkpoints"
    for age, path in enumerate(list_checkpoints(directory)):
        for file in [*path.iterdir(), path]:
            os.utime(file, (1e9 + 1000 * age, 1e9 + 1000 * age))
    assert newest_checkpoint(directory).name == "step-00000006"
    capsys.readouterr()
    train(arguments(tmp_path, from_resume=True, keep_last=2, **flags))
    assert "step-00000006 (step 6 of 8)" in capsys.readouterr().out


def test_what_a_killed_writer_left_of_the_same_step_is_not_taken_over(tmp_path):
    """It may be of another engine, with other files."""
    leftover = checkpoint.temporary_path(tmp_path, 2)
    (leftover / "shards").mkdir(parents=True)
    (leftover / "shards" / "half.distcp").write_bytes(b"half")
    path = save_checkpoint(tmp_path, 2, lambda path: (path / "model").write_bytes(b"whole"), {}, keep_last=1)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model", "training_state.pt"]
