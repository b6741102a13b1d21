"""The student's own answers in place of the data's: which steps, which prompts, which targets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minillm.data import StepBatches
from minillm.data.batches import DERIVED
from minillm.distributed.engine import Engine
from minillm.distributed.ranks import Ranks
from minillm.inference import generate
from minillm.objectives.distill import DistillLoss
from minillm.objectives.on_policy import OnPolicy, packed, prompts_of
from tests.contracts.harness import CONFIG, RaggedRows, tiny_model

CPU = torch.device("cpu")
TOKENIZER = SimpleNamespace(end_ids=(3,))


def batch_of(*rows):
    """Rows of (ids, targets, document ids), as a batch."""
    names = ("input_ids", "targets", "document_ids")
    return {name: torch.tensor([row[n] for row in rows]) for n, name in enumerate(names)}


def test_prompts_end_where_the_last_answer_begins():
    conversation = ([5, 6, 7, 8, 9, 10], [-100, 7, 8, -100, 10, 3], [0] * 6)  # two answers: 7 8, and 10 3
    text_and_short = ([1, 11, 12, 20, 21, 0], [11, 12, 3, -100, 22, -100], [0, 0, 0, 1, 1, -1])
    nothing = ([1, 2, 3, 0, 0, 0], [-100] * 6, [0, 0, 0, -1, -1, -1])
    found = prompts_of(batch_of(conversation, text_and_short, nothing))
    assert found == [[5, 6, 7, 8, 9], [1], [20, 21]]


def test_answers_alone_are_targets():
    rows = packed([[5, 6, 7], [8]], [[1, 2], [4, 3]], max_seq_len=16)
    (row,) = rows
    found = {}
    for document in (0, 1):
        here = row["document_ids"] == document
        found[tuple(row["input_ids"][here])] = row["targets"][here].tolist()
        assert row["position_ids"][here].tolist() == list(range(here.sum()))
    assert found == {(5, 6, 7, 1): [-100, -100, 1, 2], (8, 4): [4, 3]}
    cut = packed([[5, 6, 7]], [[1, 2, 4, 4, 4]], max_seq_len=4)
    assert cut[0]["targets"].tolist() == [-100, -100, 1, 2]
    assert packed([], [], max_seq_len=4) == []


@pytest.fixture
def make():
    """Call it with settings: an OnPolicy of a tiny model."""

    def make(**changes):
        usual = {"seed": 1, "on_policy": 1.0, "max_new_tokens": 6, "sampling_temperature": 1.0, "max_seq_len": 24,
                 "batch_size": 3}  # fmt: skip
        args = SimpleNamespace(**(usual | changes))
        return OnPolicy(tiny_model().train(), TOKENIZER, args, Engine(Ranks(), CPU), generate)

    return make


def test_the_answers_follow_from_seed_and_step_alone(make):
    micro_batches = StepBatches(RaggedRows(), batch_size=3, global_batch_size=6).step(0, 0)
    on_policy = make()
    first, again = on_policy(micro_batches, step=0), make()(micro_batches, step=0)
    later = on_policy(micro_batches, step=1)
    assert on_policy.student.training
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert "on_policy" in one
        assert one["input_ids"].shape[0] == 3
    assert any(
        one["targets"].shape != two["targets"].shape or not torch.equal(one["targets"], two["targets"])
        for one, two in zip(first, later, strict=False)
    )
    n_prompts = sum(len(prompts_of(batch)) for batch in micro_batches)
    n_answers = sum(len(prompts_of(batch)) for batch in first)
    assert n_answers == n_prompts > 0


def test_the_share_of_steps_is_as_asked_and_validation_has_none(make):
    on_policy = make(on_policy=0.3, max_new_tokens=1)
    on_policy._answered = lambda batch, generator: ["answered"]
    data = StepBatches(RaggedRows(), batch_size=3, global_batch_size=3).step(0, 0)
    took = [on_policy(data, step=step) == ["answered"] for step in range(400)]
    assert 0.22 < np.mean(took) < 0.38
    assert make(on_policy=0.0)(data, step=0) is data
    loss = DistillLoss(None, None, None, on_policy=make())
    assert loss.prepare(data, training=False, step=0) is data
    assert loss.prepare(data, training=True, step=0) is not data


def test_every_rank_has_as_many_micro_batches(make, monkeypatch):
    """Answers are of any length, so ranks pack them into unlike numbers of rows: padding evens it."""
    data = StepBatches(RaggedRows(), batch_size=3, global_batch_size=6).step(0, 0)
    on_policy = make()
    alone = on_policy(data, step=0)
    monkeypatch.setattr(on_policy.engine.ranks, "gather", lambda n: [n, n + 2])
    with_another = on_policy(data, step=0)
    assert len(with_another) == len(alone) + 2
    for padding in with_another[-2:]:
        assert padding.keys() == alone[0].keys()
        assert (padding["targets"] == -100).all()
        assert (padding["document_ids"] == -1).all()
        assert padding["input_ids"].shape[0] == 3


def test_rows_without_a_prompt_become_padding(make):
    empty = {name: torch.full((3, 4), fill) for name, fill in
             (("input_ids", 0), ("targets", -100), ("position_ids", 0), ("document_ids", -1))}  # fmt: skip
    (batch,) = make()([empty], step=0)
    assert set(batch) == {*empty, *DERIVED, "on_policy"}
    assert (batch["targets"] == -100).all()
    assert CONFIG.vocab_size > 3
