"""Preference tuning inside a run: the loss and its figures against a loop over single replies with whole logits."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.data import StepBatches
from minillm.losses import dpo_loss, kto_loss
from minillm.objectives.preference import PreferenceLoss
from minillm.objectives.reference import Reference
from minillm.reports.tracking import read_metrics
from minillm.training.run import Run
from tests.contracts.harness import MOE_CONFIG, largest_difference, tiny_model
from tests.contracts.pair_runs import RaggedPairs, arguments, train

LOSSES = {
    "sigmoid": {},
    "cdpo": {"loss_type": "sigmoid", "label_smoothing": 0.2, "sft_weight": 0.7},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "simpo": {"loss_type": "simpo", "gamma": 0.4, "beta": 2.0},
    "orpo": {"loss_type": "orpo"},
    "kto": {"loss_type": "kto", "desirable_weight": 1.5},
}


def changed(model, seed=5):
    """The same model with other weights, as a reference that differs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def alone(model, row, document, prefix=""):
    """(Σ log p, number of targets) of one document, by itself, with whole logits."""
    here = torch.from_numpy(row[prefix + "document_ids"] == document)
    ids, targets = (torch.from_numpy(row[prefix + name])[here] for name in ("input_ids", "targets"))
    log_probs = F.log_softmax(model(ids[None])[0], dim=-1)
    chosen = targets != -100
    return log_probs[chosen, targets[chosen]].sum(), int(chosen.sum())


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_single_replies(tmp_path, name):
    args = arguments(tmp_path, **LOSSES[name])
    rows = RaggedPairs(judged=name == "kto")
    policy, other = tiny_model(double=True), changed(tiny_model(double=True))
    with Run(args, stage="rlhf") as run:
        run.wrap(policy)
        reference = Reference("copy", other, args, run.engine) if args.reference_kind else None
        loss = PreferenceLoss(policy, reference, args, run.engine)
        micro_batches = StepBatches(rows, batch_size=4, global_batch_size=12, shuffle=False).step(0, 0)
        micro_batches = loss.prepare(micro_batches, training=True, step=0)
        found = [loss(policy, batch) for batch in micro_batches]
    total, count = sum(each[0] for each in found), sum(float(each[1]) for each in found)
    ours = torch.autograd.grad(total, list(policy.parameters()))

    sums = {"policy": [], "reference": [], "length": [], "other": [], "label": []}
    for row in rows.rows:
        for document in range(int(row["document_ids"].max()) + 1):
            log_prob, length = alone(policy, row, document)
            sums["policy"].append(log_prob)
            sums["reference"].append(alone(other, row, document)[0].detach())
            sums["length"].append(torch.tensor(float(length)))
            if name == "kto":
                sums["label"].append(bool(row["labels"][row["document_ids"] == document][0]))
                with torch.no_grad():
                    moved = alone(policy, row, document, "other_")[0] - alone(other, row, document, "other_")[0]
                sums["other"].append(float(moved))
    policy_sums, reference_sums = torch.stack(sums["policy"]), torch.stack(sums["reference"])
    if name == "kto":
        baseline = torch.tensor(max(0.0, sum(sums["other"]) / len(sums["other"])))
        expected, n = kto_loss(policy_sums, reference_sums, torch.tensor(sums["label"]), baseline, beta=args.beta,
                               desirable_weight=1.5)  # fmt: skip
    else:
        references = (reference_sums[0::2], reference_sums[1::2]) if reference else ()
        lengths = torch.stack(sums["length"])
        names = ("beta", "loss_type", "label_smoothing", "gamma", "sft_weight")
        settings = {key: getattr(args, key) for key in names}
        settings |= {"chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2]}
        expected, n = dpo_loss(policy_sums[0::2], policy_sums[1::2], *references, **settings)
    assert count == float(n)
    assert float(total) == pytest.approx(float(expected), rel=1e-10)
    theirs = torch.autograd.grad(expected, list(policy.parameters()))
    names = [key for key, _ in policy.named_parameters()]
    assert largest_difference(dict(zip(names, ours, strict=True)), dict(zip(names, theirs, strict=True))) < 1e-10


@pytest.mark.parametrize(
    "name, config",
    [("sigmoid", None), ("cdpo", None), ("simpo", None), ("orpo", None), ("kto", None), ("kto", MOE_CONFIG)],
    ids=["sigmoid", "cdpo", "simpo", "orpo", "kto", "kto-moe"],
)
def test_gradients_do_not_depend_on_how_a_step_is_cut(tmp_path, name, config):
    """Ragged pairs, 11 rows of 12, so one row of padding; KTO's baseline is over the whole step."""

    def gradients(batch_size):
        kept = []
        args = arguments(tmp_path / f"{name}{batch_size}", batch_size=batch_size, global_batch_size=12, max_steps=2,
                         learning_rate=1e-3, **LOSSES[name])  # fmt: skip
        train(args, double=True, before_update=lambda run, _: kept.append(
            {key: p.grad.clone() for key, p in run.model.named_parameters()}
        ), **({"config": config} if config else {}))  # fmt: skip
        return kept

    whole = gradients(12)
    assert len(whole) == 2
    for batch_size in (1, 4):
        for cut, wanted in zip(gradients(batch_size), whole, strict=True):
            assert largest_difference(cut, wanted) <= 1e-10 if config else 1e-12


def test_figures_are_means_over_pairs(tmp_path):
    args = arguments(tmp_path, max_steps=2, batch_size=3, accumulation_steps=4)
    train(args)
    first, second = read_metrics(tmp_path / "rlhf_16" / "metrics.jsonl")
    assert first["accuracy"] == 0  # no margin is above 0 before the first update
    assert second["margin"] == pytest.approx(second["reward_chosen"] - second["reward_rejected"], rel=1e-5)
    assert 0 <= second["accuracy"] <= 1
    assert second["kl"] > 0
    rows = RaggedPairs().rows
    chosen = [
        int((row["targets"][row["document_ids"] == n] >= 0).sum())
        for row in rows
        for n in range(0, int(row["document_ids"].max()) + 1, 2)
    ]
    assert first["length_chosen"] == pytest.approx(sum(chosen) / len(chosen))
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_a_fall_of_both_is_said_once(tmp_path):
    args, model = arguments(tmp_path), tiny_model()
    with Run(args, stage="rlhf") as run:
        loss = PreferenceLoss(model, Reference("copy", model, args, run.engine), args, run.engine)
    row = dict.fromkeys(loss.measures.names, 0.0)
    both = row | {"reward_chosen": -0.2, "reward_rejected": -0.9}
    one = row | {"reward_chosen": 0.1, "reward_rejected": -0.9}
    (note,) = loss.measures.notes(both)
    assert "both fall" in note
    assert "-0.200" in note
    assert loss.measures.notes(both) == []  # said
    assert loss.measures.notes(one) == []
    assert len(loss.measures.notes(both)) == 1  # fell again


def test_a_run_that_pushes_both_down_warns(tmp_path, capsys):
    def break_policy(run, reference):
        with torch.no_grad():
            run.model.model.embed_tokens.weight.mul_(3.0)  # far surer of what is wrong

    train(arguments(tmp_path, learning_rate=1e-9, batch_size=11), before_update=break_policy)
    rows = read_metrics(tmp_path / "rlhf_16" / "metrics.jsonl")
    assert max(rows[1]["reward_chosen"], rows[1]["reward_rejected"]) < -0.15
    assert capsys.readouterr().out.count("both fall") == 1
