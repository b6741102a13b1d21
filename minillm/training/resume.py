"""What a checkpoint holds of a run beside its weights, and how a run goes on from it."""

import sys

from minillm.errors import UserError
from minillm.training import checkpoint

COUNTERS = ("step", "epoch", "step_in_epoch", "tokens", "seconds", "skipped_steps", "best_loss", "_eval_step")


def identity_of(run) -> dict:
    """Return what must be the same for a checkpoint to be gone on with: what decides the order of the data, the
    schedule and the loss."""
    return {
        "data": run.loader.rows.data_hash,
        "seed": run.args.seed,
        "rows_per_step": run.rows_per_step,
        "max_seq_len": run.args.max_seq_len,
        "total_steps": run.total_steps,
        "learning_rate": run.args.learning_rate,
        "lr_scheduler": run.args.lr_scheduler,
        **run.balance.settings(),
        **run.output.settings(),
        **run.settings,
    }


def state_of(run, rng_states: list[dict]) -> dict:
    """Return the training state, tensors and plain values only."""
    return {
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.engine.scaler.state_dict(),
        "rng": rng_states,
        "counters": {name: getattr(run, name) for name in COUNTERS},
        "window": run._window,
        "measures": run.measures.state(),
        "experts": run.balance.state(),
        "watch": run.watch.state(),
        "identity": identity_of(run),
        "tracker_run_id": run.tracker.run_id,
    }


def restore(run) -> str | None:
    """Put a run where its newest intact checkpoint was; return its tracker's run id.

    Raises:
        UserError: there is none, or it was made with other settings; the message lists what differs.
    """
    directory = run.directory / "checkpoints"
    quiet = None if run.ranks.is_main else (lambda line: None)
    path = checkpoint.newest_checkpoint(directory, report=quiet or (lambda line: print(line, file=sys.stderr)))
    if path is None:
        raise UserError(f"--from_resume: no intact checkpoint under {directory}; start without it")
    state = checkpoint.load_state(path)
    was, now = state["identity"], identity_of(run)
    different = [f"{key}: {was.get(key)} then, {now[key]} now" for key in now if was.get(key) != now[key]]
    if different:
        raise UserError(f"--from_resume: {path} was made with other settings ({'; '.join(different)})")
    run.output.read_checkpoint(run.model, path)
    run.optimizer.load_state_dict(state["optimizer"])
    run.engine.scaler.load_state_dict(state["scaler"])
    for name, value in state["counters"].items():
        setattr(run, name, value)
    run._restored, run._save_step = state["window"], run.step
    run.measures.load_state(state.get("measures"))
    run.balance.load_state(state.get("experts"))  # checkpoints of dense models may lack it
    run.watch.load_state(state.get("watch"))
    if len(state["rng"]) == run.ranks.world_size:
        checkpoint.set_rng_state(state["rng"][run.ranks.rank])
    if run.ranks.is_main:
        print(f"resumed from {path} (step {run.step} of {run.total_steps})")
    return state["tracker_run_id"]
