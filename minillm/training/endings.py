"""How a run of several ranks ends before its time."""

import signal
import sys
from typing import NoReturn

import torch.distributed as dist

from minillm.checkpoints.interrupt import Interrupted
from minillm.distributed.launcher import resume_command
from minillm.errors import UserError


def stop(run, signal_number: int) -> NoReturn:
    """End a run that has just been saved because a signal came; say how to go on."""
    run.saver.wait()
    ended = Interrupted(signal_number)
    if run.ranks.is_main:
        run.tracker.close()
        print(f"{ended.signal_name}: saved after step {run.step} of {run.total_steps}", file=sys.stderr)
        print(f"resume with: {resume_command()}", file=sys.stderr)
    run.ranks.barrier()  # no rank leaves while another still writes: a launcher would end that one
    raise ended


def explain(error: BaseException, run) -> None:
    """Say what an error that ends a run means, where that is not plain: a second Ctrl-C, or a rank that is gone.

    Raises:
        Interrupted: in place of KeyboardInterrupt, which would show where the program was.
        UserError: in place of what the communication library says when another rank has died or hangs.
    """
    if isinstance(error, KeyboardInterrupt):
        if run.ranks.is_main:
            how = f"; resume with: {resume_command()}" if run._save_step >= 0 else ", before its first checkpoint"
            print(f"interrupted after step {run.step}{how}", file=sys.stderr)
        raise Interrupted(signal.SIGINT) from None
    is_of_ranks = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))
    )
    if run.ranks.world_size > 1 and is_of_ranks:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(" This is typically")[0].rstrip(".")
        raise UserError(
            f"rank {run.ranks.rank} of {run.ranks.world_size} lost the others after step {run.step}: one of them has "
            f"ended, or did not answer for --timeout_minutes (its own output says why; here: {reason}); go on from the "
            f"newest checkpoint with --from_resume"
        ) from error
