"""``Step``: the micro-batches of one optimizer update, and what their losses add up to.

A mean loss is Σ loss / Σ targets over *all* micro-batches of all ranks. The denominator follows from the batches alone,
so it is known before the first forward pass, and each micro-batch adds its share of the gradient at once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minillm.distributed.engine import Engine


class Step:
    """One update's micro-batches on this rank; iterating moves each to the device.

    Attributes:
        micro_batches: this rank's, on the CPU.
        n_targets, n_tokens: of the whole step, over all ranks.
        loss_sum, n_counted: on the device: what this rank's losses sum to so far, and the targets that they counted.
        began: when the step began, by ``time.perf_counter``.
    """

    def __init__(
        self,
        micro_batches: list[dict[str, Tensor]],
        *,
        n_targets: float,
        n_tokens: float,
        began: float,
        engine: Engine,
        device: torch.device,
        sum_dtype: torch.dtype,
    ):
        self.micro_batches, self.n_targets, self.n_tokens, self.began = micro_batches, n_targets, n_tokens, began
        self.engine, self.device = engine, device
        self.loss_sum = torch.zeros((), dtype=sum_dtype, device=device)
        self.n_counted = torch.zeros((), dtype=sum_dtype, device=device)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(self.micro_batches):
            self.engine.set_last(index == len(self.micro_batches) - 1)  # only the last backward averages over ranks
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def backward(self, loss_sum: Tensor, n_targets: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's mean loss.

        The engine averages over ranks, so the sum is multiplied by their number and divided by the count of
        targets of the whole step: what remains is Σ loss / Σ targets, however the step was cut.

        Args:
            loss_sum: of the micro-batch. n_targets: what the loss has counted in it; ``check_count`` compares.
        """
        self.loss_sum += loss_sum.detach().to(self.loss_sum)
        self.n_counted += n_targets.detach().to(self.n_counted)
        self.engine.backward(loss_sum * (self.engine.ranks.world_size / max(self.n_targets, 1e-12)))

    def check_count(self, n_counted: float) -> None:
        """Raise ``RuntimeError`` unless the losses of all ranks counted as many targets as the batches hold."""
        tolerance = 1e-6 if self.n_counted.dtype == torch.float64 else 1e-3
        if abs(n_counted - self.n_targets) > tolerance * max(1.0, self.n_targets):
            raise RuntimeError(
                f"the losses counted {n_counted:.10g} targets, the batches of the step hold {self.n_targets:.10g}: the "
                f"mean would be wrong; give Run.start the count that belongs to the loss"
            )
