"""What a checkpoint holds of a run besides its weights, and how a run resumes from it."""

import dataclasses
import sys
from pathlib import Path

import torch

from minillm.checkpoints import checkpoint
from minillm.errors import UserError

COUNTERS = (
    "step", "epoch", "step_in_epoch", "tokens", "seconds", "skipped_steps", "best_loss", "_eval_step", "last_eval",
    "_validation_due", "n_warmup_steps",
)  # fmt: skip
# Flags that decide the schedule, the updates and the order of the data: a run that resumes with others is another run.
FLAGS = (
    "seed", "max_seq_len", "learning_rate", "lr_scheduler", "warmup_ratio", "min_lr_ratio", "decay_ratio",
    "weight_decay", "adam_beta1", "adam_beta2", "grad_clip", "valid_ratio",
)  # fmt: skip
CHAT_TEMPLATE = "chat template"
LENGTH = ("epochs", "max_steps")  # flags that say how long to train
SHARDS = "shards"  # of a checkpoint that all ranks have written together


def identity_of(run) -> dict:
    """Return what must match to resume: what decides the order of the data, the
    schedule, the model and the loss."""
    return {
        "data": run.loader.rows.data_hash,
        **_encoding(run),
        **{name: getattr(run.args, name) for name in FLAGS},
        "rows_per_step": run.rows_per_step,
        "total_steps": run.total_steps,
        **{f"model's {key}": value for key, value in dataclasses.asdict(run.model.config).items()},
        **run.balance.settings(),
        **run.output.settings(),
        **run.settings,
    }


def _encoding(run) -> dict:
    """Return what decides the ids of the data; it is in the data's hash too, but here a difference can be named."""
    if run.tokenizer is None:
        return {}
    store = getattr(run.loader.rows, "store", None)
    is_chat = store is not None and store.has_mask  # texts know no chat template
    return {
        "tokenizer": run.tokenizer.content_hash,
        "tokens around a document": f"{run.tokenizer.bos_token_id} and {run.tokenizer.eos_token_id}",
        **({CHAT_TEMPLATE: run.tokenizer.template_hash} if is_chat else {}),
    }


def environment_of(run) -> dict:
    """Return what may differ when a run resumes, but changes its last digits; a message reports the difference."""
    return {
        "dtype": str(run.dtype).removeprefix("torch."),
        "parallel": run.args.parallel,
        "ranks": run.ranks.world_size,
        "batch_size": run.args.batch_size,
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def files_of(rows) -> dict[str, str]:
    """Return the data files beneath ``rows`` by path, with the number of their documents and a hash of their bytes."""
    found = {}
    for inner in ("rows", "new", "old"):  # rows around rows: with columns, with replayed ones
        if inner in vars(rows) and not isinstance(vars(rows)[inner], list):
            found |= files_of(vars(rows)[inner])
    if not found and hasattr(rows, "store"):
        for path, shard in zip(rows.files, rows.store.shards, strict=True):
            found[str(path)] = f"{shard.meta['n_documents']:,} documents, sha256 {shard.meta['sha256'][:16]}"
    return found


def state_of(run, rng_states: list[dict], measures: list, optimizer: dict | None) -> dict:
    """Return the training state, tensors and plain values only.

    Args:
        rng_states, measures: of every rank. optimizer: its whole state, or what of it is not in shards.
    """
    return {
        "optimizer": optimizer,
        "scaler": run.engine.scaler_state(),
        "rng": rng_states,
        "counters": {name: getattr(run, name) for name in COUNTERS},
        "window": run._window,
        "measures": measures,
        "experts": run.balance.state(),
        "watch": run.watch.state(),
        "alarm": run.alarm.state(),
        "identity": identity_of(run),
        "asked_for": {name: getattr(run.args, name) for name in LENGTH},
        "surroundings": environment_of(run),
        "data_files": files_of(run.loader.rows),
        "tracker_run_id": run.tracker.run_id,
    }


def may_resume(run) -> bool:
    """Return whether a run resumes from a checkpoint, if there is one."""
    return run.args.from_resume or run.args.auto_resume or run.ranks.is_restart


def find(run) -> Path | None:
    """Return the checkpoint to go on from; None where the run begins. Rank 0 looks, and all ranks do as it says.

    Raises:
        UserError: ``--from_resume``, and there is no intact one.
    """
    directory = run.directory / "checkpoints"
    if not may_resume(run):
        return None
    path = None
    if run.ranks.is_main:
        path = checkpoint.newest_checkpoint(directory, report=lambda line: print(line, file=sys.stderr))
    path = run.ranks.gather(path)[0]
    refuse_nothing(run, is_there=path is not None)
    return path


def refuse_nothing(run, *, is_there: bool) -> None:
    """Raise ``UserError`` when ``--from_resume`` was said and there is nothing to go on from."""
    if run.args.from_resume and not run.ranks.is_restart and not is_there:
        raise UserError(
            f"--from_resume: no intact checkpoint under {run.directory / 'checkpoints'}; start without it, or with "
            f"--auto_resume, which begins where there is none"
        )


def refuse_to_overwrite(run) -> None:
    """Raise ``UserError`` when a new run would take the directory of another one without having been told to."""
    held = checkpoint.holds_a_run(run.directory)
    if held and not (run.args.overwrite or may_resume(run)):
        is_finished = held == "a finished run"
        go_on = "make it longer (--from_resume --extend)" if is_finished else "resume it (--from_resume)"
        another = "--lora_name NAME" if hasattr(run.args, "lora_name") else "--run_name NAME"
        raise UserError(
            f"{run.directory} holds {held}: {go_on}, start over (--overwrite, which moves it to "
            f"a folder {checkpoint.EARLIER}-1 of that directory), or give the new run another name ({another})"
        )


def restore(run, path: Path) -> str | None:
    """Put a run where the checkpoint ``path`` was; return its tracker's run id.

    Raises:
        UserError: it was made with other data or settings; the message lists what differs.
    """
    state = checkpoint.load_state(path)
    _refuse_another_run(run, state, path)
    run.is_resumed = True
    if run.ranks.is_main:
        checkpoint.put_damaged_aside(path.parent, newest=path)
    optimizer = state["optimizer"]
    target = run.model if run.engine.trains_model else run.saver.copy.model
    if not (path / SHARDS).is_dir():
        run.output.read_checkpoint(target, path)
    elif hasattr(run.engine, "load_shards"):
        run.engine.load_shards(path / SHARDS, optimizer["param_groups"])
        target = None
    else:
        from minillm.distributed.fsdp import read_shards

        optimizer = read_shards(path / SHARDS, target, run.engine.shapes(), optimizer["param_groups"])
    if target is not None:
        run.engine.load(target, optimizer)
    run.engine.load_scaler_state(state["scaler"])
    for name, value in state["counters"].items():
        setattr(run, name, value)
    run._restored, run._save_step = state["window"], run.step
    run.measures.load_state(state["measures"], run.ranks)
    run.balance.load_state(state.get("experts"))  # checkpoints of dense models may lack it
    run.watch.load_state(state.get("watch"))
    run.alarm.load_state(state.get("alarm"))
    if len(state["rng"]) == run.ranks.world_size:
        checkpoint.set_rng_state(state["rng"][run.ranks.rank])
    else:  # the ranks' own states are of no use to another number of them
        checkpoint.seed_everything(run.args.seed + 1000 * run.step + run.ranks.rank)
    if run.ranks.is_main:
        print(f"resumed from {path} (step {run.step} of {run.total_steps})")
        other = _differences(state.get("surroundings", {}), environment_of(run))
        if other:
            print(f"another environment, so the last digits may differ: {'; '.join(other)}")
    return state["tracker_run_id"]


def _refuse_another_run(run, state: dict, path: Path) -> None:
    made_with, identity = state["identity"], identity_of(run)
    changed = [key for key in identity if made_with.get(key) != identity[key]]
    if not changed:
        return
    if changed == ["total_steps"]:
        _check_longer(run, state, path)
        return
    different = _differences(made_with, identity)
    was, now = state.get("data_files", {}), files_of(run.loader.rows)
    files = [f"{name}: {was.get(name, 'not used')} then, {now.get(name, 'not used')} now" for name in sorted(was | now)
             if was.get(name) != now.get(name)]  # fmt: skip
    if "rows_per_step" in changed:
        n_rows = made_with.get("rows_per_step")
        different.append(f"--global_batch_size {n_rows} keeps the rows per step on any number of ranks")
    if CHAT_TEMPLATE in changed:
        different.append(
            f"the chat template changed: {run.tokenizer.origin} holds another one than {path}, whose template goes "
            f"with this run"
        )
    text = "; ".join(different + files)
    raise UserError(
        f"--from_resume: {path} was made with other data or settings ({text}); use those, or start over without "
        f"--from_resume"
    )


def _check_longer(run, state: dict, path: Path) -> None:
    """Raise ``UserError`` unless ``--extend`` was given and the schedule so far is that of the longer run too."""
    n_before, n_now = state["identity"]["total_steps"], run.total_steps
    asked = state.get("asked_for", {})
    flags = [f"--{name} {asked[name]} then, {getattr(run.args, name)} now" for name in LENGTH
             if name in asked and asked[name] != getattr(run.args, name)]  # fmt: skip
    change = f"{path} belongs to a run of {n_before} steps, this one would have {n_now} ({'; '.join(flags)})"
    new_run = f"or start a new run from its weights: --from_weight {path.parent.parent} --run_name NAME"
    step, scheduler = state["counters"]["step"], run.args.lr_scheduler
    if n_now < n_before:
        raise UserError(f"--from_resume: {change}; a run cannot become shorter: keep the flag, {new_run}")
    if not run.args.extend:
        raise UserError(f"--from_resume: {change}; keep the flag, add --extend to make the run longer, {new_run}")
    run.n_warmup_steps = state["counters"].get("n_warmup_steps", run.n_warmup_steps)
    before, now = run.learning_rate_factor(n_before), run.learning_rate_factor(n_now)
    if any(before(past) != now(past) for past in range(step)):
        raise UserError(
            f"--extend: {change}, and the {scheduler} schedule of a longer run has other learning rates up to step "
            f"{step}; constant can be extended, and wsd before its decay; {new_run.removeprefix('or ')}"
        )


def _differences(was: dict, now: dict) -> list[str]:
    def shown(value) -> str:
        text = str(value)
        return text[:16] if len(text) == 64 else text  # a hash

    return [f"{key}: {shown(was.get(key))} then, {shown(now[key])} now" for key in now if was.get(key) != now[key]]
