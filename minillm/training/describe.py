"""What a run tells people about itself: the header, the footer, ``run.yaml`` and the facts of its page."""

import dataclasses
import math
import shlex
import sys

from minillm.reports.announce import Footer, Header
from minillm.reports.tracking import rate

FEW_UPDATES = 50
ACCURACIES = {  # by what a loss counts
    "token": "next tokens that are the most probable one",
    "pair": "pairs with the chosen reply ahead",
    "reply": "replies on the right side",
}
MODES = {"pretrain": 0, "full_sft": 1, "rlhf": 2, "reason": 3}  # --model_mode of eval_model.py


def header_of(run) -> Header:
    """Return the header of a run that is about to start or to resume."""
    args, loader = run.args, run.loader
    loaders = {"training data": loader, "validation data": run.valid_loader}
    summaries = {name: each.rows.summary for name, each in loaders.items() if each is not None}
    replayed = [("replayed data", summary["replayed"]) for summary in summaries.values() if "replayed" in summary]
    updates = f"{run.total_steps:,}, each of {run.rows_per_step:,} rows x {args.max_seq_len:,} tokens"
    if args.max_steps:
        updates += f"; --max_steps {args.max_steps}"
    else:
        epochs = "1 epoch" if args.epochs == 1 else f"{args.epochs:g} epochs"
        updates += f"; {epochs} of {loader.steps_per_epoch:,}"
    if run.progress.step:
        updates += f"; resumed at step {run.progress.step:,}"
    warning = "" if args.max_steps else few_updates(run.total_steps, args)
    warmup = f"{_plural(run.progress.n_warmup_steps, 'step')} of warm-up"
    origin = getattr(run.tokenizer, "origin", "none")
    return Header(
        name=run.directory.name,
        stage=run.stage,
        weights=getattr(run.model, "origin", None) or args.from_weight or f"from scratch, --seed {args.seed}",
        parameters=run.size.text,
        tokenizer=f"{origin}, {run.tokenizer.vocab_size:,} tokens" if run.tokenizer is not None else origin,
        data=[(name, summary) for name, summary in [*summaries.items(), *replayed] if summary],
        updates=updates,
        learning_rate=f"{rate(args.learning_rate)}, {args.lr_scheduler}, {warmup}",
        device=f"{run.device}, {_name(run.dtype)}, {_plural(run.ranks.world_size, 'rank')} ({args.parallel})",
        directory=str(run.directory),
        warnings=(warning,) if warning else (),
        loss=_preference_loss(run.objective.settings()),
        metrics=_metrics_of(run),
    )


def footer_of(run) -> Footer:
    """Return the footer of a run that is over."""
    progress, objective = run.progress, run.objective
    validates_otherwise = objective.unit == "token" and not objective.is_cross_entropy
    return Footer(
        name=run.directory.name,
        unit=objective.unit,
        train_loss=run.log.last_loss,
        valid_loss=progress.last_eval.get("loss"),
        metrics=metrics_text({name: progress.last_eval.get(name) for name in run.metrics.names if name != "loss"}),
        best=best_of(run),
        early_stop=early_stop(run),
        n_steps=progress.step,
        seconds=progress.seconds,
        directory=run.directory,
        warnings=run.log.alarm.messages,
        next_command=next_command(run),
        objective=f"{objective.name}, while validation is cross-entropy" if validates_otherwise else "",
    )


def run_file_of(run) -> dict:
    """Return the content of ``run.yaml`` that is the run's own: its configuration, model and data."""
    return {
        "stage": run.stage,
        "command": shlex.join(sys.argv),
        "loss": {"name": run.objective.name, "unit": run.objective.unit},
        "arguments": dataclasses.asdict(run.args),
        "resolved": {
            "device": str(run.device),
            "dtype": _name(run.dtype),
            "ranks": run.ranks.world_size,
            "rows_per_step": run.rows_per_step,
            "total_steps": run.total_steps,
        },
        "model": dataclasses.asdict(run.model.config),
        "n_parameters": run.size.n_parameters,
        "n_active_parameters": run.size.n_active,
        "data": {"hash": run.loader.rows.data_hash, "summary": run.loader.rows.summary},
    }


def facts_of(run) -> dict[str, str]:
    """Return the facts of a finished run's page as (name, text), in the order in which they are shown."""
    progress, args, unit = run.progress, run.args, run.objective.unit
    facts = {
        "command": "python " + shlex.join(sys.argv),
        "parameters": run.size.text,
        "steps": f"{progress.step:,} of {run.rows_per_step} rows x {args.max_seq_len} tokens",
        "tokens seen": f"{progress.tokens:,}",
        "training time": f"{progress.seconds:.0f} s on {run.device} ({_name(run.dtype)})",
        "data": f"{args.data_path} (hash {run.loader.rows.data_hash[:16]})",
    }
    if progress.skipped_steps:
        facts["skipped steps (float16 overflow)"] = str(progress.skipped_steps)
    if run.log.alarm.messages:
        facts["warnings"] = "; ".join(run.log.alarm.messages)
    names = {
        "loss": f"validation loss (nats/{unit})",
        "bits_per_byte": "bits per byte",
        "floor": "entropy floor (nats/token)",
        "accuracy": ACCURACIES[unit],
        "margin": "margin of the rewards",
        "kl": "distance from the reference (nats/reply)",
    }
    last_eval = progress.last_eval
    if early_stop(run):
        facts["stopped early"] = early_stop(run)
    if best_of(run):
        facts["best/"] = best_of(run)
    names = {name: name for name in run.metrics.names} | names
    return facts | {text: f"{last_eval[key]:.4f}" for key, text in names.items() if last_eval.get(key) is not None}


def metrics_text(values: dict[str, float | None]) -> str:
    """Return metrics as text behind a loss: ``, exact 0.25, bleu 12.5``."""
    return "".join(f", {name} {value:.4g}" for name, value in values.items() if value is not None)


def best_of(run) -> str:
    """Return the best value of the criterion and its step; empty before a validation."""
    progress, criterion = run.progress, run.metrics.names[0]
    if progress.best_value is None:
        return ""
    step = f" at step {progress.best_step:,}" if progress.best_step >= 0 else ""  # older checkpoints do not know it
    return f"{criterion} {progress.best_value:.4f}{step}"


def early_stop(run) -> str:
    """Return why the run ends before its last step; empty if it does not."""
    if not run.stops_early:
        return ""
    criterion, n = run.metrics.names[0], run.progress.n_without_gain
    return (
        f"stopped after step {run.progress.step:,} of {run.total_steps:,}: {criterion} has not been better in "
        f"{_plural(n, 'validation')} (--patience {run.args.patience})"
    )


def few_updates(n_updates: int, args) -> str:
    """Return what to change where ``n_updates`` are too few to learn from; empty where they are enough."""
    if n_updates >= FEW_UPDATES:
        return ""
    epochs = math.ceil(FEW_UPDATES * args.epochs / n_updates)
    rows = "lower --batch_size" if not args.global_batch_size else "lower --global_batch_size"
    if args.accumulation_steps > 1:
        rows = f"lower --accumulation_steps (now {args.accumulation_steps})"
    else:
        rows += f" (now {args.global_batch_size or args.batch_size})"
    packed = "" if args.packing == "none" else f", --max_seq_len (now {args.max_seq_len}), or --packing none"
    return (
        f"only {n_updates} updates, where fewer than {FEW_UPDATES} seldom teach anything: raise --epochs (now "
        f"{args.epochs:g}) to {epochs}, or {rows}{packed} for more, smaller rows"
    )


def next_command(run) -> str:
    """Return the command that tries the trained model."""
    has_chats = getattr(getattr(run.loader.rows, "store", None), "has_mask", run.stage != "pretrain")
    mode = MODES.get(run.stage, 1 if has_chats else 0)
    if not run.output.is_adapter:
        return shlex.join(["python", "eval_model.py", "--from_weight", str(run.directory), "--model_mode", str(mode)])
    base = str(getattr(run.model, "origin", "") or run.args.from_weight)
    words = ["--from_weight", base, "--lora_name", str(run.directory), "--model_mode", "1"]
    if run.args.tokenizer_path:
        words += ["--tokenizer_path", run.args.tokenizer_path]
    return shlex.join(["python", "eval_model.py", *words])


def _metrics_of(run) -> str:
    """Return what validations measure and decide; empty where it is the loss alone, and nothing ends early."""
    names, patience = run.metrics.names, run.args.patience
    if run.valid_loader is None or (names == ("loss",) and not patience):
        return ""
    text = f"{', '.join(names)}; the weights of the best {names[0]} are kept in best/"
    return f"{text}; the run ends after {_plural(patience, 'validation')} without a better one" if patience else text


def _preference_loss(settings: dict) -> str:
    """Return which preference loss a run has; empty for the other stages, which have one loss each."""
    if "loss_type" not in settings:
        return ""
    text = f"{settings['loss_type']}, beta {settings['beta']:g}"
    if settings.get("sft_weight"):
        text += f", plus {settings['sft_weight']:g} times the mean loss of a chosen reply's tokens (--sft_weight)"
    return text


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
