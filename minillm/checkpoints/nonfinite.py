"""When numbers are not finite: stop with the batch saved."""

from typing import NoReturn

import torch

from minillm.errors import UserError


def stop_for_nonfinite(run, step, loss_sum: float, grad_norm: float) -> NoReturn:
    """Save the step's micro-batches (of this rank) next to the checkpoints, and raise a ``UserError`` that names them.

    Args:
        step: with its ``micro_batches`` and ``n_targets``. loss_sum: of the step's targets, over all ranks.
    """
    path = run.directory / f"nonfinite-step-{run.step + 1:08d}-rank{run.ranks.rank}.pt"
    try:
        torch.save({"step": run.step + 1, "micro_batches": step.micro_batches}, path)
        where = f"its batch is saved in {path}"
    except (OSError, RuntimeError) as error:  # torch's own for a full disk
        where = f"its batch could not be saved ({error})"
    raise UserError(
        f"step {run.step + 1}: loss {loss_sum / max(step.n_targets, 1e-12)}, gradient norm {grad_norm}: not "
        f"finite, the update was not applied; {where}. Lower --learning_rate, or look at "
        f"that batch; the newest checkpoint is untouched"
    )
