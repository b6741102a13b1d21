"""How a run ends before its time."""

import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.checkpoints.interrupt import Interrupted
from minillm.distributed.launcher import resume_command
from minillm.distributed.ranks import Ranks
from minillm.errors import UserError
from minillm.reports.tracking import Tracker


def stop(ranks: Ranks, signal_number: int, *, tracker: Tracker, step: int, total_steps: int) -> NoReturn:
    """End a run that was saved because a signal came; print how to resume it."""
    interrupted = Interrupted(signal_number)
    if ranks.is_main:
        tracker.close()
        print(f"{interrupted.signal_name}: saved after step {step} of {total_steps}", file=sys.stderr)
        print(f"resume with: {resume_command()}", file=sys.stderr)
    ranks.barrier()  # no rank leaves while another still writes: a launcher would kill that one
    raise interrupted


def stop_for_nonfinite(
    directory: Path, micro_batches: list[dict[str, Tensor]], *, step: int, rank: int, loss: float, grad_norm: float
) -> NoReturn:
    """Save this rank's micro-batches of a step in ``directory``, and raise a ``UserError`` that names the file.

    Args:
        loss: mean over the targets of all ranks. grad_norm: before clipping.
    """
    path = directory / f"nonfinite-step-{step:08d}-rank{rank}.pt"
    try:
        torch.save({"step": step, "micro_batches": micro_batches}, path)
        where = f"its batch is saved in {path}"
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's own for a full disk
        where = f"its batch could not be saved ({error})"
    raise UserError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was not applied; {where}. Lower "
        f"--learning_rate, or look at that batch; the newest checkpoint is untouched"
    )


def explain(error: BaseException, ranks: Ranks, *, step: int, is_saved: bool) -> None:
    """Explain an error that ends a run, where its own text does not: a second Ctrl-C, or a rank that is gone.

    Args:
        step: the last one made. is_saved: whether the run has a checkpoint.

    Raises:
        Interrupted: in place of KeyboardInterrupt, which would show where the program was.
        UserError: in place of what the communication library says when another rank has died or hangs.
    """
    if isinstance(error, KeyboardInterrupt):
        if ranks.is_main:
            how = f"; resume with: {resume_command()}" if is_saved else ", before its first checkpoint"
            print(f"interrupted after step {step}{how}", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
    is_of_ranks = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
    )
    if ranks.world_size > 1 and is_of_ranks:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" This is typically")[0].rstrip(".")
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} lost the others after step {step}: one of them has ended, or did "
            f"not answer for --timeout_minutes (its own output says why; here: {reason}); resume from the newest "
            f"checkpoint with --from_resume"
        ) from error
