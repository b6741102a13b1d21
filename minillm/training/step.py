"""``Step``: the micro-batches of one optimizer update, and what their losses add up to. ``Progress``: the steps so far.

A mean loss is Σ loss / Σ targets over *all* micro-batches of all ranks. The denominator follows from the batches alone,
so it is known before the first forward pass, and each micro-batch adds its share of the gradient at once.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from minillm.distributed.engine import Engine


class Step:
    """One update's micro-batches on this rank; iterating moves each to the device.

    Args:
        micro_batches: this rank's, on the CPU. number: of the update, from 1.
        n_targets, n_tokens: of the whole step, over all ranks. began: when the step began, by ``time.perf_counter``.

    Attributes:
        loss_sum, n_counted: on the device: the sum of this rank's losses so far, and the targets that they counted.
        numbers: on the host after ``read``: the sum of the losses and the gradient norm, over all ranks.
    """

    def __init__(
        self,
        micro_batches: list[dict[str, Tensor]],
        *,
        number: int,
        n_targets: float,
        n_tokens: int,
        began: float,
        engine: Engine,
    ):
        self.micro_batches, self.number, self.began, self.engine = micro_batches, number, began, engine
        self.n_targets, self.n_tokens = n_targets, n_tokens
        self.loss_sum = torch.zeros((), dtype=engine.sum_dtype, device=engine.device)
        self.n_counted = torch.zeros((), dtype=engine.sum_dtype, device=engine.device)

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(self.micro_batches):
            self.engine.set_last(index == len(self.micro_batches) - 1)  # only the last backward averages over ranks
            yield self.engine.to_device(batch)

    def backward(self, loss_sum: Tensor, n_targets: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's mean loss.

        The engine averages over ranks, so the sum is multiplied by their number and divided by the count of
        targets of the whole step: what remains is Σ loss / Σ targets, however the step was cut.

        Args:
            loss_sum: of the micro-batch. n_targets: how many targets the loss counted in it; ``read`` compares.
        """
        self.loss_sum += loss_sum.detach().to(self.loss_sum)
        self.n_counted += n_targets.detach().to(self.n_counted)
        self.engine.backward(loss_sum * (self.engine.ranks.world_size / max(self.n_targets, 1e-12)))

    def close(self, grad_norm: Tensor, *, added: Tensor | float = 0.0) -> Tensor:
        """Sum the numbers of the step over ranks; return on the device whether all are finite.

        Args:
            grad_norm: before clipping. added: what the balance of experts added to the losses; rows of metrics compare
                with validation, so they show the loss of the tokens alone.
        """
        loss_sum, n_counted = self.engine.ranks.sum(torch.stack([self.loss_sum, self.n_counted]))
        numbers = torch.stack([loss_sum - added, grad_norm.to(loss_sum), n_counted])
        self._numbers, self._are_read = HostCopy(numbers), False
        return numbers.isfinite().all()

    def read(self) -> None:
        """Wait for the numbers of ``close``; set ``loss``, the mean over the targets, and ``grad_norm``.

        Raises:
            RuntimeError: the losses of all ranks counted another number of targets than the batches hold.
        """
        self.loss_sum, self.grad_norm, n_counted = self._numbers.tolist()
        tolerance = 1e-6 if self.engine.sum_dtype == torch.float64 else 1e-3
        if abs(n_counted - self.n_targets) > tolerance * max(1.0, self.n_targets):
            raise RuntimeError(
                f"the losses counted {n_counted:.10g} targets, the batches of the step hold {self.n_targets:.10g}: the "
                f"mean would be wrong; the objective's count must be that of its loss"
            )


class HostCopy:
    """Numbers on their way from the device to the host.

    ``tolist`` waits for them alone. A plain ``tensor.tolist()`` on a GPU would wait for all work begun since, too.
    """

    def __init__(self, numbers: Tensor):
        self.numbers, self.is_there = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self.is_there = torch.cuda.Event()
            self.is_there.record()

    def tolist(self) -> list[float]:
        """Return the numbers, when they have arrived."""
        if self.is_there is not None:
            self.is_there.synchronize()
        return self.numbers.tolist()


@dataclass(kw_only=True)
class Progress:
    """The counters of a run; a checkpoint holds all of them.

    Attributes:
        step: updates made. epoch, step_in_epoch: where the data stands.
        tokens: seen over all ranks, without padding. seconds: spent in steps, without validation and saving.
        skipped_steps: updates left out because of an overflow (float16).
        best_loss, last_eval, eval_step: the best validation loss, the last validation, and its step.
        validation_due: a checkpoint made before this step's validation says so; a resumed run begins with it.
        n_warmup_steps: of the schedule; a longer run keeps those of the run it extends.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    best_loss: float = math.inf
    last_eval: dict = field(default_factory=dict)
    eval_step: int = -1
    validation_due: bool = False
    n_warmup_steps: int = 0

    def advance(self, n_tokens: int, seconds: float, *, steps_per_epoch: int) -> None:
        """Count one more step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        if self.step_in_epoch >= steps_per_epoch:
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.tokens += n_tokens
        self.seconds += seconds

    def state(self) -> dict:
        """Return what a checkpoint holds."""
        return asdict(self)

    def load_state(self, counters: dict) -> None:
        """Continue from ``counters``; older checkpoints write some names with an underscore, or lack them."""
        for name, value in counters.items():
            setattr(self, name.removeprefix("_"), value)
