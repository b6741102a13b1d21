"""What a checkpoint holds of a run besides its weights and its optimizer, and how a run resumes from it."""

import dataclasses
from pathlib import Path

import torch

from minillm.checkpoints import checkpoint, resume

# Flags that decide the schedule, the updates and the order of the data: a run that resumes with others is another run.
FLAGS = (
    "seed", "max_seq_len", "learning_rate", "lr_scheduler", "warmup_ratio", "warmup_steps", "min_lr_ratio",
    "decay_ratio", "weight_decay", "adam_beta1", "adam_beta2", "grad_clip", "valid_ratio",
)  # fmt: skip


def training_state(run, per_rank: list[tuple[dict, list]]) -> dict:
    """Return the training state: tensors and plain values only.

    Args:
        per_rank: the random generators' states and the measures of every rank.
    """
    rng_states, measures = zip(*per_rank, strict=True)
    return {
        "scaler": run.engine.scaler_state(),
        "rng": list(rng_states),
        "counters": run.progress.state(),
        "window": run.log.window,
        "measures": list(measures),
        "experts": run.balance.state(),
        "watch": run.watch.state(),
        "alarm": run.log.alarm.state(),
        "identity": identity_of(run),
        "asked_for": {name: getattr(run.args, name) for name in resume.LENGTH_FLAGS},
        "surroundings": environment_of(run),
        "data_files": data_files_of(run.loader.rows),
        "tracker_run_ids": run.log.tracker.run_ids,
    }


def check_same_run(run, path: Path, saved: dict) -> None:
    """Raise ``UserError`` unless the checkpoint ``path`` belongs to this run, or to a shorter one that may be extended.

    Args:
        saved: its training state.
    """
    data_files = data_files_of(run.loader.rows)
    lengths_differ = resume.check_same_run(path, saved, identity_of(run), data_files=data_files)
    if lengths_differ:
        run.progress.n_warmup_steps = saved["counters"].get("n_warmup_steps", run.progress.n_warmup_steps)
        lr_factor = run.learning_rate_factor
        resume.check_longer(path, saved, run.args, total_steps=run.total_steps, lr_factor=lr_factor)


def resume_from(run, path: Path, saved: dict) -> None:
    """Continue where the checkpoint ``path`` was made; ``check_same_run`` comes before."""
    if run.ranks.is_main:
        checkpoint.rename_damaged(path.parent, newest=path)
    run.saver.load(path, saved["optimizer"])
    run.engine.load_scaler_state(saved["scaler"])
    run.progress.load_state(saved["counters"])
    run.saver.last_step = run.progress.step
    run.schedule.factor = run.learning_rate_factor(run.total_steps)  # with the checkpoint's warm-up
    run.log.window = saved["window"]
    run.objective.measures.load_state(saved["measures"], run.ranks)
    run.balance.load_state(saved.get("experts"))  # checkpoints of dense models may lack it
    run.watch.load_state(saved.get("watch"))
    run.log.alarm.load_state(saved.get("alarm"))
    run.log.tracker.run_ids = _tracker_run_ids(saved)
    if len(saved["rng"]) == run.ranks.world_size:
        checkpoint.set_rng_state(saved["rng"][run.ranks.rank])
    else:  # the ranks' own states are of no use to another number of them
        checkpoint.seed_everything(run.args.seed + 1000 * run.progress.step + run.ranks.rank)
    run.log.print(f"resumed from {path} (step {run.progress.step} of {run.total_steps})")
    if changes := resume.differences(saved.get("surroundings", {}), environment_of(run)):
        run.log.print(f"another environment, so the last digits may differ: {'; '.join(changes)}")


def _tracker_run_ids(saved: dict) -> dict[str, str]:
    """Return the runs at trackers, by tracker; checkpoints of earlier versions know wandb alone."""
    if "tracker_run_ids" in saved:
        return saved["tracker_run_ids"]
    return {"wandb": saved["tracker_run_id"]} if saved.get("tracker_run_id") else {}


def identity_of(run) -> dict:
    """Return what must match to resume: what decides the order of the data, the schedule, the model and the loss."""
    return {
        "data": run.loader.rows.data_hash,
        **_encoding_of(run),
        **{name: getattr(run.args, name) for name in FLAGS},
        "rows_per_step": run.rows_per_step,
        "total_steps": run.total_steps,
        **{f"model's {key}": value for key, value in dataclasses.asdict(run.model.config).items()},
        **run.balance.settings(),
        **run.output.settings(),
        **run.objective.settings(),
        **run.metrics.settings(),
    }


def _encoding_of(run) -> dict:
    """Return what decides the ids of the data; the data's hash covers it too, but here a difference has a name."""
    if run.tokenizer is None:
        return {}
    store = getattr(run.loader.rows, "store", None)
    is_chat = store is not None and store.has_mask  # plain text does not depend on the chat template
    return {
        "tokenizer": run.tokenizer.content_hash,
        "tokens around a document": f"{run.tokenizer.bos_token_id} and {run.tokenizer.eos_token_id}",
        **({resume.CHAT_TEMPLATE: run.tokenizer.template_hash} if is_chat else {}),
    }


def environment_of(run) -> dict:
    """Return what may differ when a run resumes but changes its last digits; a message reports the difference."""
    return {
        "dtype": str(run.dtype).removeprefix("torch."),
        "parallel": run.args.parallel,
        "ranks": run.ranks.world_size,
        "batch_size": run.args.batch_size,
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def data_files_of(rows) -> dict[str, str]:
    """Return the data files beneath ``rows`` by path, with the number of their documents and a hash of their bytes."""
    files = {}
    for name in ("rows", "new", "old"):  # rows around rows: with columns, with replayed ones
        inner = vars(rows).get(name)
        if inner is not None and not isinstance(inner, list):
            files |= data_files_of(inner)
    if not files and hasattr(rows, "store"):
        for path, shard in zip(rows.files, rows.store.shards, strict=True):
            files[str(path)] = f"{shard.meta['n_documents']:,} documents, sha256 {shard.meta['sha256'][:16]}"
    return files
