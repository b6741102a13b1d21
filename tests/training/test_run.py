"""``Run``: what happens around the loop, on the tiny run of the contracts."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.data import StepBatches
from minillm.distributed.engine import Engine
from minillm.distributed.launcher import resume_command
from minillm.errors import UserError
from minillm.training.run import MAX_SKIPPED_IN_A_ROW, Run
from minillm.training.step import Step
from tests.contracts.checks import ScaledEngine
from tests.contracts.harness import CONFIG, MOE_CONFIG, RaggedRows, arguments, train


def poison_step(step, value=math.inf):
    """Return a hook that spoils one gradient before the update of that step."""

    def spoil(run):
        if run.step == step:
            next(run.model.parameters()).grad.view(-1)[3] = value

    return spoil


def test_metrics_rows_are_exact_means_over_targets(tmp_path):
    """A row's loss is the mean over the targets of its steps, not the mean of the steps' means."""
    every = train(arguments(tmp_path / "1", batch_size=5, max_steps=4, learning_rate=1e-30))["metrics"]
    pairs = train(arguments(tmp_path / "2", batch_size=5, max_steps=4, learning_rate=1e-30, log_interval=2))["metrics"]
    assert [row["step"] for row in every] == [1, 2, 3, 4]
    assert [row["step"] for row in pairs] == [2, 4]
    counts = targets_of_steps(arguments(tmp_path / "3", batch_size=5, max_steps=4), RaggedRows())
    for index, row in enumerate(pairs):
        first, second = every[2 * index], every[2 * index + 1]
        n_first, n_second = counts[2 * index], counts[2 * index + 1]
        assert n_first != n_second
        wanted = (first["loss"] * n_first + second["loss"] * n_second) / (n_first + n_second)
        assert row["loss"] == pytest.approx(wanted, rel=1e-9)


def targets_of_steps(args, rows):
    loader = StepBatches(rows, batch_size=args.batch_size, global_batch_size=args.batch_size, seed=args.seed)
    return [
        sum(int((batch["targets"] != -100).sum()) for batch in loader.step(0, index)) for index in range(args.max_steps)
    ]


def test_steps_cross_epochs_and_keep_the_last_partial_one(tmp_path):
    """17 rows in steps of 6: three steps an epoch, the third of 5 rows."""
    metrics = train(arguments(tmp_path, batch_size=6, max_steps=0, epochs=2), n_rows=17)["metrics"]
    assert [(row["step"], row["epoch"]) for row in metrics] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2)]
    n_tokens = int(RaggedRows(17).lengths.sum())
    assert metrics[2]["tokens"] == n_tokens
    assert metrics[5]["tokens"] == 2 * n_tokens


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nonfinite_gradient_stops_the_run_and_saves_its_batch(tmp_path, value):
    args = arguments(tmp_path, batch_size=4, save_interval=1, max_steps=5)
    with pytest.raises(UserError, match=r"step 3: .*not finite.*nonfinite-step-00000003-rank0\.pt") as error:
        train(args, before_update=poison_step(2, value))
    directory = tmp_path / "pretrain_16"
    saved = torch.load(directory / "nonfinite-step-00000003-rank0.pt", weights_only=True)
    assert saved["step"] == 3
    assert saved["micro_batches"][0]["input_ids"].shape[0] == 4
    assert "Lower --learning_rate" in str(error.value)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_nonfinite_update_is_not_applied(tmp_path):
    weights = {}

    def look(run):
        poison_step(1)(run)
        if run.step == 1:
            weights.update({"model": run.model, "before": [p.detach().clone() for p in run.model.parameters()]})

    with pytest.raises(UserError):
        train(arguments(tmp_path, batch_size=4), before_update=look)
    for parameter, before in zip(weights["model"].parameters(), weights["before"], strict=True):
        assert torch.equal(parameter, before)


class LateEngine(Engine):
    """Reads a step's numbers one step late, as on a GPU."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reads_late = True


@pytest.mark.parametrize("log_interval", [1, 3])
def test_numbers_read_late_are_the_same(tmp_path, log_interval):
    flags = {"batch_size": 4, "max_steps": 7, "log_interval": log_interval, "save_interval": 3}
    plain = train(arguments(tmp_path / "plain", **flags))
    late = train(arguments(tmp_path / "late", **flags), engine=LateEngine)
    assert late["metrics"] == plain["metrics"]
    assert all(torch.equal(late["weights"][name], weight) for name, weight in plain["weights"].items())


def test_numbers_are_read_one_step_late_between_log_steps(tmp_path, monkeypatch):
    reads, run_of = [], {}
    real = Step.read
    monkeypatch.setattr(Step, "read", lambda step: (reads.append((step.number, run_of["run"].step)), real(step)))
    flags = {"batch_size": 4, "max_steps": 6, "log_interval": 5}
    train(arguments(tmp_path, **flags), engine=LateEngine, prepare=lambda run: run_of.update(run=run))
    assert reads == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 5)]  # (step, updates counted by then)


class Waits(TorchDispatchMode):
    """Notes the operators that make the host wait for a device: they return a number, or a shape that needs one."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indexes_by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name.lstrip("_") in {each.lstrip("_") for each in self.NAMES} or indexes_by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "experts"])
def test_between_log_steps_an_update_waits_for_nothing(tmp_path, monkeypatch, config):
    """Clipping, the check, the optimizer, the balance of experts. The numbers read are those of the step before."""
    waits, lists, update, tolist = {}, [], Run.update, torch.Tensor.tolist

    def counted(run, step):
        lists.clear()
        with Waits() as found:
            update(run, step)
        waits[step.number] = found.found + [len(numbers) for numbers in lists]

    def noted(tensor):  # on a CPU it is no operator
        lists.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(Run, "update", counted)
    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    flags = {"batch_size": 4, "max_steps": 5, "log_interval": 4}
    train(arguments(tmp_path / "late", **flags), engine=LateEngine, config=config)
    on_the_host, of_the_step_before = 2, 3  # what ranks have noticed; loss, norm and count
    assert waits[1] == [on_the_host]
    assert waits[2] == waits[3] == [on_the_host, of_the_step_before]


def test_a_late_look_finds_an_update_that_is_not_finite_and_was_left_out(tmp_path):
    """The optimizer leaves the update out by itself; the run ends one step later, before anything is saved."""
    seen = []

    def look(run):
        poison_step(2)(run)
        seen.append([p.detach().clone() for p in run.model.parameters()])

    args = arguments(tmp_path, batch_size=4, max_steps=6, log_interval=6, save_interval=2)
    with pytest.raises(UserError, match=r"step 3: .*not finite, the update was not applied"):
        train(args, engine=LateEngine, before_update=look)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    saved = torch.load(tmp_path / "pretrain_16" / "nonfinite-step-00000003-rank0.pt", weights_only=True)
    assert saved["step"] == 3
    assert [p.name for p in (tmp_path / "pretrain_16" / "checkpoints").iterdir()] == ["step-00000002"]


def test_under_a_loss_scale_the_step_is_skipped_and_counted(tmp_path):
    """As under float16: the update is left out, the scale halved, the run goes on, the loss row says so."""
    weights = []

    def look(run):
        poison_step(1)(run)
        weights.append([p.detach().clone() for p in run.model.parameters()])

    result = train(arguments(tmp_path, batch_size=4, max_steps=4), engine=ScaledEngine, before_update=look)
    assert result["skipped_steps"] == 1
    assert all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[2], weights[3], strict=True))
    rows = [json.loads(line) for line in (tmp_path / "pretrain_16" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert [row["loss_scale"] for row in rows] == [1024, 512, 512, 512]
    assert [row["loss"] is None for row in rows] == [False, True, False, False]


def test_too_many_skips_stop_the_run(tmp_path):
    def spoil(run):
        next(run.model.parameters()).grad.view(-1)[0] = math.inf

    args = arguments(tmp_path, batch_size=4, max_steps=MAX_SKIPPED_IN_A_ROW + 5)
    with pytest.raises(UserError, match=f"step {MAX_SKIPPED_IN_A_ROW}: .*not finite"):
        train(args, engine=ScaledEngine, before_update=spoil)


@pytest.mark.parametrize("wrong", [True, False])
def test_first_loss_is_compared_with_ln_v(tmp_path, capsys, wrong):
    def prepare(run):
        run.log.alarm.from_scratch = True
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(3.0 if wrong else 0.1)

    train(arguments(tmp_path, batch_size=8, max_steps=1), prepare=prepare)
    assert ("should start near ln V = 4.111" in capsys.readouterr().out) == wrong


def test_clipping_bounds_the_update_but_not_the_reported_norm(tmp_path):
    norms = []

    class Watched(Engine):
        def step(self, is_finite=None):
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
            norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
            return super().step(is_finite)

    metrics = train(arguments(tmp_path / "a", batch_size=8, grad_clip=0.25), engine=Watched)["metrics"]
    assert norms == pytest.approx([0.25] * 3, rel=1e-4)  # torch adds 1e-6 to the norm it divides by
    assert all(row["grad_norm"] > 0.5 for row in metrics)
    norms.clear()
    metrics = train(arguments(tmp_path / "b", batch_size=8, grad_clip=0.0), engine=Watched)["metrics"]
    assert norms == pytest.approx([row["grad_norm"] for row in metrics], rel=1e-5)


def test_gradients_are_averaged_only_at_the_end_of_a_step(tmp_path):
    seen = []

    class Watched(Engine):
        def set_last(self, is_last):
            seen.append(is_last)

    train(arguments(tmp_path, batch_size=3, accumulation_steps=4, max_steps=2), engine=Watched)
    assert seen == [False, False, False, True] * 2


def test_global_batch_size_must_fit(tmp_path):
    with pytest.raises(UserError, match="--global_batch_size 10 is not a multiple of batch_size x ranks = 4 x 1"):
        train(arguments(tmp_path, batch_size=4, global_batch_size=10))
    assert Run(arguments(tmp_path, batch_size=4, global_batch_size=12), stage="x").rows_per_step == 12
    assert Run(arguments(tmp_path, batch_size=4, accumulation_steps=2), stage="x").rows_per_step == 8


def test_checkpoints_are_kept_and_dropped(tmp_path):
    train(arguments(tmp_path, batch_size=4, save_interval=2, max_steps=8, keep_last=2))
    names = sorted(path.name for path in (tmp_path / "pretrain_16" / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]  # finish() would save step 8


def test_an_interrupted_run_prints_how_to_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_pretrain.py", "--data_path", "my texts.jsonl"])

    def interrupt(run):
        if run.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        train(arguments(tmp_path, batch_size=4, save_interval=1), before_update=interrupt)
    assert ended.value.code == 130
    err = capsys.readouterr().err
    assert "python train_pretrain.py --data_path 'my texts.jsonl' --from_resume" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command().startswith("torchrun --nproc_per_node 2 train_pretrain.py --data_path")
