"""Which weights are kept in ``best/``, when a run ends early, and that measuring changes nothing of the training."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minillm.reports.tracking import read_metrics
from minillm.training.run import Run
from minillm.training.step import Progress
from tests.contracts.harness import arguments, train

SHORT = {"batch_size": 4, "max_steps": 9, "eval_interval": 1}


class Scripted:
    """A metric with known values, in the order of the validations; measuring draws random numbers and sets modes."""

    needs_model = True

    def __init__(self, values, name="exact"):
        self.values, self.names, self.steps = values, (name,), []

    def settings(self):
        return {"eval_metric": self.names[0]}

    def measure(self, model, ranks=None):
        torch.rand(3), np.random.random(3), random.random()  # noqa: NPY002 - the global generators are the point
        model.eval()
        step = self.run.progress.step
        self.steps.append(step)
        return {self.names[0]: self.values[step]}, [{"question": "q", "answer": f"of {step} 水", "expected": "e"}]

    def watch(self, run):
        self.run = run


def run_with(directory, values, *, name="exact", weights=None, **flags):
    """Train with the scripted values (by step); return the metrics object and what ``train`` returns."""
    metrics = Scripted(values, name)

    def keep(run):
        if weights is not None:
            weights[run.step] = {key: value.clone() for key, value in run.model.state_dict().items()}

    args = arguments(directory, **(SHORT | flags))
    done = train(args, validate=True, metrics=metrics, prepare=metrics.watch, before_update=keep, finish=True)
    return metrics, done


def rows_of(directory, split="valid"):
    clock = ("seconds", "tokens_per_s", "mfu")
    rows = read_metrics(directory / "pretrain_16" / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows if row["split"] == split]


VALUES = {1: 0.1, 2: 0.4, 3: 0.4, 4: 0.2, 5: 0.5, 6: 0.3, 7: 0.45, 8: 0.5, 9: 0.1}


def test_best_is_by_the_criterion_and_not_by_the_loss(tmp_path, capsys):
    weights = {}
    run_with(tmp_path, VALUES, weights=weights)  # weights[n] are those after n updates
    rows = rows_of(tmp_path)
    assert {row["step"]: row["exact"] for row in rows} == VALUES
    by_loss = min(rows, key=lambda row: row["loss"])["step"]
    assert by_loss != 5
    best = load_file(tmp_path / "pretrain_16" / "best" / "model.safetensors")
    assert all(torch.equal(best[name], weights[5][name]) for name in best)  # of equal values the first one
    assert "best            exact 0.5000 at step 5, kept in " in capsys.readouterr().out
    card = (tmp_path / "pretrain_16" / "README.md").read_text()
    assert "| best/ | exact 0.5000 at step 5 |" in card


def test_of_losses_the_lowest_is_best(tmp_path):
    weights = {}
    run_with(tmp_path, {step: -5.0 + step for step in VALUES}, name="loss", weights=weights)
    best = load_file(tmp_path / "pretrain_16" / "best" / "model.safetensors")
    assert all(torch.equal(best[name], weights[1][name]) for name in best)


def test_patience_ends_the_run_with_the_reason(tmp_path, capsys):
    weights = {}
    metrics, done = run_with(tmp_path, VALUES, weights=weights, patience=2)
    assert metrics.steps == [1, 2, 3, 4]  # 0.4 again is not better
    run = tmp_path / "pretrain_16"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004"]
    final = load_file(run / "model.safetensors")
    assert all(torch.equal(final[name], done["weights"][name]) for name in final)  # the last one, of step 4
    best = load_file(run / "best" / "model.safetensors")
    assert all(torch.equal(best[name], weights[2][name]) for name in best)
    reason = "stopped after step 4 of 9: exact has not been better in 2 validations (--patience 2)"
    assert f"  ended           {reason}\n" in capsys.readouterr().out
    assert reason in (run / "summary.html").read_text()


def test_patience_counts_from_the_last_gain(tmp_path):
    metrics, _ = run_with(tmp_path, VALUES, patience=3)
    assert metrics.steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_value_that_is_no_number_is_never_better():
    progress = Progress()
    assert [progress.add_validation({"f1": value}, criterion="f1") for value in (None, float("nan"), 0.0, 0.0)] == [
        False, False, True, False,
    ]  # fmt: skip
    assert (progress.best_value, progress.n_without_gain) == (0.0, 1)
    with_inf = Progress()
    assert not with_inf.add_validation({"loss": float("inf")}, criterion="loss")
    assert with_inf.add_validation({"loss": 3.0}, criterion="loss")


def test_checkpoints_of_earlier_versions_know_their_best_loss():
    progress = Progress()
    progress.load_state({"step": 7, "best_loss": 1.25, "_epoch": 2})
    assert (progress.step, progress.epoch, progress.best_value, progress.best_step) == (7, 2, 1.25, -1)
    assert not progress.add_validation({"loss": 1.5}, criterion="loss")
    fresh = Progress()
    fresh.load_state({"best_loss": float("inf")})
    assert fresh.best_value is None


@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_resumed_run_keeps_best_and_patience(tmp_path, monkeypatch, killed_at):
    """Killed in the validation of a step: the checkpoint of that step comes before it, and the counters with it."""
    flags = {"patience": 3, "save_interval": 1}
    _, whole = run_with(tmp_path / "whole", VALUES, **flags)
    real = Run.validate

    def dies(run):
        if run.step == killed_at:
            raise MemoryError
        real(run)

    monkeypatch.setattr(Run, "validate", dies)
    with pytest.raises(MemoryError):
        run_with(tmp_path / "killed", VALUES, **flags)
    monkeypatch.setattr(Run, "validate", real)
    metrics, resumed = run_with(tmp_path / "killed", VALUES, **flags, from_resume=True)
    assert metrics.steps == list(range(killed_at, 9))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert all(torch.equal(resumed["weights"][name], weight) for name, weight in whole["weights"].items())
    for name in ("samples.jsonl", "best/model.safetensors"):
        ours, wanted = (tmp_path / run / "pretrain_16" / name for run in ("killed", "whole"))
        assert ours.read_bytes() == wanted.read_bytes(), name
    samples = [json.loads(line) for line in (tmp_path / "killed/pretrain_16/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == list(range(1, 9))
    assert samples[0] == {"step": 1, "question": "q", "answer": "of 1 水", "expected": "e"}


def test_a_resume_drops_the_answers_past_its_checkpoint(tmp_path, monkeypatch):
    real = Run.validate

    def dies(run):
        real(run)
        if run.step == 5:
            raise MemoryError

    monkeypatch.setattr(Run, "validate", dies)
    with pytest.raises(MemoryError):
        run_with(tmp_path, VALUES, save_interval=3)
    monkeypatch.setattr(Run, "validate", real)
    metrics, _ = run_with(tmp_path, VALUES, save_interval=3, from_resume=True)
    assert metrics.steps == list(range(3, 10))  # the checkpoint of step 3 comes before its validation
    samples = (tmp_path / "pretrain_16" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == list(range(1, 10))
    assert "水" in samples[0]


def test_a_run_that_ended_early_stays_ended_and_a_larger_patience_continues_it(tmp_path, capsys):
    run_with(tmp_path, VALUES, patience=2)
    capsys.readouterr()
    metrics, _ = run_with(tmp_path, VALUES, patience=2, from_resume=True)
    assert metrics.steps == []
    assert "nothing is trained; a larger --patience continues" in capsys.readouterr().out
    metrics, _ = run_with(tmp_path, VALUES, patience=3, from_resume=True)
    assert metrics.steps == [5, 6, 7, 8]
    run_with(tmp_path / "whole", VALUES, patience=3)
    assert rows_of(tmp_path) == rows_of(tmp_path / "whole")


def test_another_criterion_is_another_run(tmp_path):
    run_with(tmp_path, VALUES, max_steps=4, save_interval=2)
    with pytest.raises(Exception, match="eval_metric: exact then, f1 now"):
        run_with(tmp_path, VALUES, name="f1", max_steps=4, from_resume=True)


def test_training_is_the_same_bit_for_bit_with_metrics_and_without(tmp_path):
    """With dropout, which draws from the generator that measuring has moved and needs the mode that it has changed."""
    args = arguments(tmp_path / "with", **SHORT)
    metrics = Scripted(VALUES)
    ours = train(args, dropout=0.3, validate=True, metrics=metrics, prepare=metrics.watch)
    wanted = train(dataclasses.replace(args, save_dir=str(tmp_path / "without"), eval_interval=0), dropout=0.3)
    assert metrics.steps == list(range(1, 9))
    assert ours["metrics"] == wanted["metrics"]
    assert all(torch.equal(ours["weights"][name], weight) for name, weight in wanted["weights"].items())


# ---- lengths ------------------------------------------------------------------------------------------------------


def test_half_an_epoch_and_validations_by_epochs(tmp_path):
    """17 rows in steps of 4: 5 steps an epoch."""
    flags = {"batch_size": 4, "max_steps": 0, "epochs": 1.5, "eval_epochs": 0.4}
    done = train(arguments(tmp_path, **flags), n_rows=17, validate=True)
    assert len(done["metrics"]) == 8  # 7.5, rounded up
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 6]
    tenth = train(arguments(tmp_path / "tenth", **flags | {"epochs": 0.2}), n_rows=17, validate=True)
    assert len(tenth["metrics"]) == 1  # 0.2 * 5 is one step


def test_warmup_steps_replace_the_ratio(tmp_path):
    flags = {"max_steps": 10, "lr_scheduler": "constant", "learning_rate": 1e-2, "warmup_ratio": 0.2}
    rates = {
        n: [row["lr"] for row in train(arguments(tmp_path / str(n), **flags, warmup_steps=n))["metrics"]]
        for n in (0, 4)
    }
    assert rates[4] == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 7)
    assert rates[0] == pytest.approx([0.005] + [0.01] * 9)


def test_validation_has_a_batch_size_of_its_own(tmp_path):
    args = arguments(tmp_path, batch_size=3, accumulation_steps=4)
    run = Run(args, stage="pretrain")
    assert {name: run.batching()[name] for name in ("batch_size", "global_batch_size")} == {
        "batch_size": 3, "global_batch_size": 12,
    }  # fmt: skip
    for rows, global_rows in ((5, 10), (6, 12), (100, 100)):
        assert run.batching(rows) == run.batching() | {"batch_size": rows, "global_batch_size": global_rows}
