"""``Objective``: what validation measures, and what a loss counts."""

import pytest
import torch

from minillm.data import StepBatches
from minillm.losses import causal_lm_loss
from minillm.objectives.objective import Objective
from tests.contracts.harness import RaggedRows, tiny_model


def doubled(model, batch, router_stats=None):
    loss_sum, n_targets = causal_lm_loss(model, batch, router_stats)
    return 2 * loss_sum, n_targets


class Doubled(Objective):
    is_cross_entropy = False


class OfReplies(Doubled):
    unit = "reply"


@pytest.mark.parametrize("kind, factor", [(Objective, 2), (Doubled, 1), (OfReplies, 2)])
def test_another_loss_of_tokens_validates_with_cross_entropy(kind, factor):
    (batch,) = StepBatches(RaggedRows(), batch_size=8, global_batch_size=8).step(0, 0)
    model, objective = tiny_model(), kind(doubled)
    with torch.no_grad():
        plain, n_targets = causal_lm_loss(model, batch)
        assert objective(model, batch)[0] == 2 * plain
        assert objective.validation_loss(model, batch) == (factor * plain, n_targets)
    assert objective.count(batch) == n_targets
    assert objective.prepare([batch], training=True, step=3) == [batch]
