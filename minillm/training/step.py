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
        micro_batches: the batches of this rank, on the CPU.
        number: the update's number, from 1.
        n_targets: how many targets the whole step has, over all ranks: tokens, pairs or replies, whatever the loss
            counts (``Objective.count``).
        n_tokens: how many tokens it has, over all ranks, without padding.
        began: when the step began, by ``time.perf_counter``.

    Attributes:
        local_loss_sum, local_count: tensors on the device: the sum of this rank's losses so far, and the targets that
            the losses counted.
        loss_sum, grad_norm: numbers over all ranks, after ``read``.
        is_applied: whether the update was applied.
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
        self.local_loss_sum = torch.zeros((), dtype=engine.sum_dtype, device=engine.device)
        self.local_count = torch.zeros((), dtype=engine.sum_dtype, device=engine.device)
        self.loss_sum = self.grad_norm = math.nan
        self.is_applied = False

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
            loss_sum: the loss of the micro-batch, summed over its targets.
            n_targets: how many targets the loss counted; ``read`` compares the sum with the step's own count.
        """
        self.local_loss_sum += loss_sum.detach().to(self.local_loss_sum)
        self.local_count += n_targets.detach().to(self.local_count)
        self.engine.backward(loss_sum * (self.engine.ranks.world_size / max(self.n_targets, 1e-12)))

    def close(self, grad_norm: Tensor, *, added: Tensor | float = 0.0) -> Tensor:
        """Sum the numbers of the step over ranks; return on the device whether all are finite.

        Args:
            grad_norm: the norm of the gradients before clipping.
            added: the routers' part of the losses, over all ranks. It is subtracted, so that the logged loss compares
                with validation.
        """
        loss_sum, n_counted = self.engine.ranks.sum(torch.stack([self.local_loss_sum, self.local_count]))
        numbers = torch.stack([loss_sum - added, grad_norm.to(loss_sum), n_counted])
        self._numbers = HostCopy(numbers)
        return numbers.isfinite().all()

    def read(self) -> None:
        """Wait for the numbers of ``close``; set ``loss_sum`` and ``grad_norm``, over all ranks.

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
        last_eval, eval_step: the last validation, and its step.
        best_value, best_step: of the criterion, the first metric of --eval_metric; None before a validation.
        n_without_gain: validations since then, for --patience.
        validation_due: a checkpoint made before this step's validation says so; a resumed run begins with it.
        n_warmup_steps: of the schedule; a longer run keeps those of the run it extends.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    last_eval: dict = field(default_factory=dict)
    eval_step: int = -1
    best_value: float | None = None
    best_step: int = -1
    n_without_gain: int = 0
    validation_due: bool = False
    n_warmup_steps: int = 0

    def advance(self, n_tokens: int, seconds: float, *, steps_per_epoch: int) -> None:
        """Count one more step."""
        self.step, self.step_in_epoch = self.step + 1, self.step_in_epoch + 1
        if self.step_in_epoch >= steps_per_epoch:
            self.epoch, self.step_in_epoch = self.epoch + 1, 0
        self.tokens += n_tokens
        self.seconds += seconds

    def add_validation(self, result: dict, *, criterion: str) -> bool:
        """Note the validation of the last step; return whether the criterion is better than ever before.

        Only the loss is better where it is lower. A value that is not a number is never better.
        """
        self.eval_step, self.validation_due, self.last_eval = self.step, False, result
        value, best = result[criterion], self.best_value
        is_number = value is not None and math.isfinite(value)
        is_better = is_number and (best is None or (value < best if criterion == "loss" else value > best))
        if is_better:
            self.best_value, self.best_step = value, self.step
        self.n_without_gain = 0 if is_better else self.n_without_gain + 1
        return is_better

    def state(self) -> dict:
        """Return what a checkpoint holds."""
        return asdict(self)

    def load_state(self, counters: dict) -> None:
        """Continue from ``counters``; older checkpoints write some names with an underscore, or lack them."""
        counters = {name.removeprefix("_"): value for name, value in counters.items()}
        if "best_loss" in counters and math.isfinite(loss := counters.pop("best_loss")):  # older, without its step
            self.best_value = loss
        for name, value in counters.items():
            setattr(self, name, value)
