"""Distillation inside a run: value and gradient against whole logits, any cut of a step, a projection of its own."""

import pytest
import torch
import torch.nn.functional as F

from minillm.checkpoints.interrupt import Interrupted
from minillm.data import StepBatches
from minillm.hub.huggingface import load_model
from minillm.losses import distill_loss
from minillm.objectives.distill import PROJECTION, DistillLoss
from minillm.objectives.teacher import Teacher
from minillm.reports.tracking import read_metrics
from minillm.training.run import Run
from tests.contracts.distill_runs import V, arguments, make_teacher, make_tokenizer, student, train
from tests.contracts.harness import RaggedRows, largest_difference


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def teacher(tmp_path, tokenizer):
    return make_teacher(tmp_path / "teacher", tokenizer)


def batch_of(rows=None, **more):
    return StepBatches(rows or RaggedRows(), batch_size=9, global_batch_size=9).step(0, 0)[0] | more


def logits_of(model, batch):
    return model(batch["input_ids"], position_ids=batch["position_ids"], document_ids=batch["document_ids"])


def objective(tmp_path, teacher, tokenizer, **settings):
    args = arguments(tmp_path, teacher, **settings)
    run = Run(args, stage="distill")
    return DistillLoss(student(), Teacher(args, run.engine, tokenizer), args), run


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "symmetric", "js"])
def test_the_loss_is_that_of_whole_logits(tmp_path, teacher, tokenizer, divergence, on_policy):
    """On the student's own answers the cross-entropy has no part."""
    settings = {"alpha": 0.3, "temperature": 2.0, "divergence": divergence}
    loss, _ = objective(tmp_path, teacher, tokenizer, **settings)
    model, batch = student(), batch_of(**({"on_policy": torch.ones(())} if on_policy else {}))
    found, n_targets = loss(model, batch)
    theirs = logits_of(load_model(teacher), batch)
    expected, n = distill_loss(logits_of(model, batch), theirs, batch["targets"],
                               **(settings | ({"alpha": 0.0} if on_policy else {})))  # fmt: skip
    assert n_targets == n == (batch["targets"] != -100).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (found, expected)]
    names = [name for name, _ in model.named_parameters()]
    assert largest_difference(*(dict(zip(names, each, strict=True)) for each in gradients)) < 1e-4  # sums of float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_distilled_into_itself_has_nothing_to_learn(tmp_path, teacher, tokenizer, dtype):
    loss, run = objective(tmp_path, teacher, tokenizer, alpha=0.0, dtype=dtype)
    model = load_model(teacher).train()
    with run.autocast():
        loss_sum, n_targets = loss(model, batch_of())
    loss_sum.backward()
    assert loss_sum.item() == 0
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert (norm / n_targets).item() <= 1e-7


def test_all_tokens_kept_on_disk_teach_the_same(tmp_path, teacher, tokenizer):
    settings = {"alpha": 0.2, "temperature": 1.5}
    live = train(arguments(tmp_path / "live", teacher, **settings), tokenizer)
    kept = train(arguments(tmp_path / "kept", teacher, top_k=V, **settings), tokenizer)
    few = train(arguments(tmp_path / "few", teacher, top_k=4, **settings), tokenizer)
    losses = [[row["loss"] for row in read_metrics(run.directory / "metrics.jsonl")] for run in (live, kept, few)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # they are kept as float16
    assert losses[2][0] < losses[0][0]  # what is merged can only hide differences


@pytest.mark.parametrize("settings", [{}, {"hidden_weight": 0.7}, {"top_k": 6}], ids=str)
def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path, teacher, tokenizer, settings):
    def gradients(batch_size):
        kept = []
        cache = str(tmp_path / "cache") if "top_k" in settings else ""
        args = arguments(tmp_path / str(batch_size), teacher, batch_size=batch_size, global_batch_size=12,
                         learning_rate=1e-30, alpha=0.4, teacher_cache=cache, **settings)  # fmt: skip
        train(args, tokenizer, double=True, before_update=lambda run: kept.append(
            {name: p.grad.clone() for name, p in run.model.named_parameters()}
        ))  # fmt: skip
        return kept

    whole = gradients(12)
    assert (f"{PROJECTION}.weight" in whole[0]) == ("hidden_weight" in settings)
    assert all(gradient.norm() > 0 for gradient in whole[0].values())
    for batch_size in (1, 4):
        for cut, wanted in zip(gradients(batch_size), whole, strict=True):
            assert largest_difference(cut, wanted) <= 1e-12


def test_the_projection_is_trained_and_kept_in_checkpoints_alone(tmp_path, teacher, tokenizer):
    settings = {"hidden_weight": 0.5, "max_steps": 6, "save_interval": 2}
    whole = train(arguments(tmp_path / "whole", teacher, **settings), tokenizer, finish=True)
    exported = load_model(whole.directory)
    assert not hasattr(exported, PROJECTION)
    assert (whole.directory / "checkpoints" / "step-00000006" / f"{PROJECTION}.safetensors").is_file()

    def stop(run):
        if run.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        train(arguments(tmp_path / "cut", teacher, **settings), tokenizer, before_update=stop)
    resumed = train(arguments(tmp_path / "cut", teacher, from_resume=True, **settings), tokenizer, finish=True)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name
    start = F.normalize(torch.randn(24, 16, generator=torch.Generator().manual_seed(42)), dim=1)
    assert not torch.equal(F.normalize(getattr(whole.model, PROJECTION).weight, dim=1), start)


def test_hidden_states_come_closer(tmp_path, teacher, tokenizer):
    run = train(arguments(tmp_path, teacher, alpha=0.0, hidden_weight=5.0, max_steps=25, learning_rate=5e-3), tokenizer)
    rows = read_metrics(run.directory / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
