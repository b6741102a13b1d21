"""``Objective``: a loss, and what a run has to know about it."""

from collections.abc import Callable

from torch import Tensor, nn

from minillm.losses import causal_lm_loss, count_targets
from minillm.reports.measures import NO_MEASURES, Measures

Batch = dict[str, Tensor]


class Objective:
    """What is minimised. This class is the plain case, a loss of tokens; stages with another one derive from it.

    Args:
        loss: ``loss(model, batch, router_stats)`` → sum and count.

    Attributes:
        unit: what the loss counts, in messages.
        is_cross_entropy: whether training minimises the cross-entropy of tokens. If not, its loss is not compared with
            ln V, and validation has another one.
        name: what the loss is called where it differs from that of validation.
        measures: figures that the loss records besides its value, for the rows of metrics.
    """

    unit = "token"
    is_cross_entropy = True
    name = "the stage's own loss"
    measures: Measures = NO_MEASURES

    def __init__(self, loss: Callable):
        self.loss = loss

    @classmethod
    def of(cls, loss: Callable) -> "Objective":
        """Return ``loss`` itself if it is an objective, else the plain objective of that function."""
        return loss if isinstance(loss, Objective) else cls(loss)

    def __call__(self, model: nn.Module, batch: Batch, router_stats=None) -> tuple[Tensor, Tensor]:
        """Return ``(loss_sum, n_targets)`` of a batch, for training."""
        return self.loss(model, batch, router_stats)

    def validation_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return ``(loss_sum, n_targets)`` of a batch, for validation.

        Losses of tokens validate with plain cross-entropy, whatever they minimise: it compares with every other stage
        and with ln V, and gives bits per byte.
        """
        if self.unit == "token" and not self.is_cross_entropy:
            return causal_lm_loss(model, batch)
        return self(model, batch)

    def count(self, batch: Batch) -> Tensor:
        """Return how many targets the loss counts in a batch (float64 scalar): the denominator of the mean.

        It follows from the batch alone. For some losses a target is a pair of replies, or a reply.
        """
        return count_targets(batch["targets"], batch.get("weights"))

    def prepare(self, micro_batches: list[Batch], *, training: bool, step: int) -> list[Batch]:
        """Return a step's micro-batches with the columns that a reference (DPO) or a teacher (distillation) computes.

        By default nothing is added. It is called before the targets of the step are counted.
        """
        return micro_batches

    def settings(self) -> dict:
        """Return the settings of the loss: they must match to resume."""
        return {}
