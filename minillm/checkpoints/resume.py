"""From which checkpoint a run resumes, and whether it may."""

import sys
from collections.abc import Callable
from pathlib import Path

from minillm.checkpoints import checkpoint
from minillm.errors import UserError

CHAT_TEMPLATE = "chat template"
LENGTH_FLAGS = ("epochs", "max_steps")
# What checkpoints of earlier versions lack.
OLDER = {"warmup_steps": 0, "eval_metric": "loss", "balance_gradients": False}


def may_resume(args, ranks) -> bool:
    """Return whether a run resumes from a checkpoint, if there is one."""
    return args.from_resume or args.auto_resume or ranks.is_restart


def find_checkpoint(directory: Path, args, ranks) -> Path | None:
    """Return the checkpoint to resume from, or None where the run starts. Rank 0 looks; all ranks do as it says.

    Raises:
        UserError: ``--from_resume``, and there is no intact one.
    """
    if not may_resume(args, ranks):
        return None
    path = None
    if ranks.is_main:
        path = checkpoint.newest_checkpoint(directory, report=lambda line: print(line, file=sys.stderr))
    path = ranks.gather(path)[0]
    check_something_to_resume(directory, args, ranks, is_there=path is not None)
    return path


def check_something_to_resume(directory: Path, args, ranks, *, is_there: bool) -> None:
    """Raise ``UserError`` for ``--from_resume`` without a checkpoint."""
    if args.from_resume and not ranks.is_restart and not is_there:
        raise UserError(
            f"--from_resume: no intact checkpoint under {directory}; start without it, or with --auto_resume, which "
            f"starts a new run where there is none"
        )


def check_same_run(path: Path, state: dict, identity: dict, *, data_files: dict) -> bool:
    """Compare a checkpoint's identity with that of the run that resumes from it; return whether the length differs.

    Args:
        path, state: the checkpoint and its training state. identity: of the run now (``training.state.identity_of``).
        data_files: of the run now, by path.

    Raises:
        UserError: anything else differs; the message lists it.
    """
    saved = OLDER | state["identity"]
    changed = [key for key in identity if saved.get(key) != identity[key]]
    if not changed:
        return False
    if changed == ["total_steps"]:
        return True
    reasons = differences(saved, identity)
    if "rows_per_step" in changed:
        n_rows = saved.get("rows_per_step")
        reasons.append(f"--global_batch_size {n_rows} keeps the rows per step on any number of ranks")
    if CHAT_TEMPLATE in changed:
        reasons.append(f"the chat template changed; {path} holds the one that belongs to this run")
    files_then = state.get("data_files", {})
    for name in sorted(files_then | data_files):
        if files_then.get(name) != data_files.get(name):
            reasons.append(f"{name}: {files_then.get(name, 'not used')} then, {data_files.get(name, 'not used')} now")
    raise UserError(
        f"--from_resume: {path} was made with other data or settings ({'; '.join(reasons)}); use those, or start over "
        f"without --from_resume"
    )


def check_longer(path: Path, state: dict, args, *, total_steps: int, lr_factor: Callable) -> None:
    """Raise ``UserError`` unless ``--extend`` was given and the longer run has the same learning rates so far.

    Args:
        total_steps: of the run now. lr_factor: from a number of steps to the schedule of a run that long.
    """
    n_before, flags_then = state["identity"]["total_steps"], state.get("asked_for", {})
    flags = [
        f"--{name} {flags_then[name]} then, {getattr(args, name)} now"
        for name in LENGTH_FLAGS
        if name in flags_then and flags_then[name] != getattr(args, name)
    ]
    change = f"{path} belongs to a run of {n_before} steps, this one would have {total_steps} ({'; '.join(flags)})"
    new_run = f"start a new run from its weights: --from_weight {path.parent.parent} --run_name NAME"
    if total_steps < n_before:
        raise UserError(f"--from_resume: {change}; a run cannot become shorter: keep the flag, or {new_run}")
    if not args.extend:
        raise UserError(f"--from_resume: {change}; keep the flag, add --extend to make the run longer, or {new_run}")
    before, now, step = lr_factor(n_before), lr_factor(total_steps), state["counters"]["step"]
    if any(before(past) != now(past) for past in range(step)):
        raise UserError(
            f"--extend: {change}, and the {args.lr_scheduler} schedule of a longer run has other learning rates up to "
            f"step {step}; constant can be extended, and wsd before its decay; {new_run}"
        )


def differences(then: dict, now: dict) -> list[str]:
    """Return what of ``now`` was another value ``then``, as text; hashes are cut short."""

    def text(value) -> str:
        return str(value)[:16] if len(str(value)) == 64 else str(value)

    return [f"{key}: {text(then.get(key))} then, {text(now[key])} now" for key in now if then.get(key) != now[key]]
