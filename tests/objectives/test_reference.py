"""The reference of preference tuning: bit-equal to the policy at first, and still the same after 50 steps."""

import copy
import math

import pytest
import torch

from minillm import hardware
from minillm.data import StepBatches
from minillm.lora import disable_lora
from minillm.objectives.reference import token_log_probs
from minillm.reports.tracking import read_metrics
from minillm.training.validation import evaluate_loss
from tests.contracts.harness import CONFIG, MOE_CONFIG, tiny_model
from tests.contracts.pair_runs import RaggedPairs, arguments, train

KINDS = {
    "copy": {"reference": "copy"},
    "adapter": {"lora_name": "a"},
    "copy of what gets an adapter": {"lora_name": "a", "reference": "copy"},
    "adapter with pissa": {"lora_name": "a", "lora_init": "pissa", "lora_rank": 3},
    "cached": {"reference": "cached"},
}


@pytest.fixture(autouse=True)
def no_measured_speed(monkeypatch):
    """How fast this machine multiplies is measured in every run, for a figure that no test here looks at."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: None)


def first_batch(rows=None):
    return StepBatches(rows or RaggedPairs(), batch_size=11, global_batch_size=11).step(0, 0)[0]


def test_log_probs_are_those_of_the_logits():
    model, batch = tiny_model(double=True), first_batch()
    found = token_log_probs(model, batch)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], document_ids=batch["document_ids"])
    for row, column in zip(*(batch["targets"] != -100).nonzero(as_tuple=True), strict=True):
        expected = torch.log_softmax(logits[row, column], dim=0)[batch["targets"][row, column]]
        assert abs((found[row, column] - expected).item()) < 1e-12
    assert found[batch["targets"] == -100].abs().max().item() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [CONFIG, MOE_CONFIG], ids=["dense", "moe"])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_ln_2_and_nothing_has_moved(tmp_path, kind, config, dtype):
    """To the last bit of every pair; but for PiSSA, which takes the weights apart and adds them up again."""
    if config is MOE_CONFIG and "lora_name" in KINDS[kind]:
        pytest.skip("an adapter of experts starts like any other")
    args = arguments(tmp_path, max_steps=1, dtype=dtype, batch_size=4, accumulation_steps=3, **KINDS[kind])
    train(args, config=config)
    (row,) = read_metrics(next(tmp_path.rglob("metrics.jsonl")))
    # The mean is divided out of a float32 sum, which may round; the margins themselves are exactly nothing.
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-2 if "pissa" in kind else 1e-7, rel=0)
    if "pissa" not in kind:
        assert (row["margin"], row["reward_chosen"], row["reward_rejected"], row["kl"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["copy", "cached", "adapter"])
def test_validation_is_ln_2_too(tmp_path, kind):
    """There the kernels are others than in training, for the policy and for its reference, of whatever kind."""
    results = []

    def validate(run, reference):
        rows = reference.add_to(RaggedPairs(3), training=False)
        loader = StepBatches(rows, batch_size=3, global_batch_size=3, shuffle=False)
        results.append(evaluate_loss(run.engine, loader, run.objective))

    args = arguments(tmp_path, max_steps=1, dtype="bfloat16", batch_size=3, **KINDS[kind])
    train(args, before_update=validate, n_rows=3)
    (result,) = results
    assert (result["kl"], result["margin"], result["reward_chosen"]) == (0, 0, 0)
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_does_not_move_in_50_steps(tmp_path, kind):
    """Whether the policy was copied or adapted: the same bits before the first update and after the last."""
    batch, seen = first_batch(), []

    def look(run, reference):
        if run.step in (0, 50):
            seen.append((reference.columns(batch), token_log_probs(run.model, batch).detach().clone()))

    args = arguments(tmp_path, max_steps=51, log_interval=50, batch_size=4, **KINDS[kind])
    _, reference = train(args, before_update=look)
    (first, policy), (last, moved) = seen
    assert not torch.equal(policy, moved)  # it has learnt
    if kind != "cached":  # whose model is the policy itself: what it says is on disk
        assert torch.equal(first["reference_log_probs"], last["reference_log_probs"])
    if kind == "copy":
        plain = tiny_model()
        for name, weight in reference.model.state_dict().items():
            assert torch.equal(weight, plain.state_dict()[name]), name


def test_a_copy_of_an_adapted_model_does_not_follow_it():
    """A closure over the layers would go on computing with the policy's adapter."""
    from minillm.lora import apply_lora

    policy = tiny_model()
    apply_lora(policy, rank=3, init="gaussian", generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(policy).requires_grad_(False)
    batch = first_batch()
    before = token_log_probs(reference, batch)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    assert torch.equal(token_log_probs(reference, batch), before)
    with disable_lora(policy):
        assert not torch.equal(token_log_probs(policy, batch), before)


def test_cached_numbers_train_the_same_model(tmp_path):
    runs = [train(arguments(tmp_path / kind, reference=kind, batch_size=4))[0] for kind in ("copy", "cached")]
    for name, weight in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], weight, rtol=1e-5, atol=1e-5)


def test_each_model_has_a_cache_of_its_own_in_a_place_that_was_named(tmp_path):
    cache = str(tmp_path / "cache")
    for double in (False, False, True):
        train(arguments(tmp_path, reference="cached", reference_cache=cache), double=double)
    assert len(list((tmp_path / "cache").iterdir())) == 2
