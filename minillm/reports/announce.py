"""What a run says of itself at its start and at its end, for people: the header, the footer, a line of the log."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from minillm.data.report import data_lines
from minillm.data.sources.rejects import check_rejected
from minillm.reports.tracking import duration, rate

FEW_UPDATES = 50
MODES = {"pretrain": 0, "full_sft": 1, "rlhf": 2, "reason": 3}  # of eval_model.py


@dataclass(frozen=True, kw_only=True)
class Header:
    """The facts of a run before its first step.

    ``data``: (name, summary) of the rows of each kind, see ``PackedRows.summary``. ``warnings``: what is odd about
    the settings, with what to change.
    """

    name: str
    stage: str
    weights: str
    parameters: str
    tokenizer: str
    data: list[tuple[str, dict]]
    updates: str
    learning_rate: str
    device: str
    directory: str
    warnings: tuple[str, ...] = ()
    loss: str = ""

    def text(self) -> str:
        """Return the block of lines."""
        lines = [f"{self.name}, parameters: {self.parameters}"]
        lines += _entry("weights", [self.weights])
        lines += _entry("tokenizer", [self.tokenizer])
        for name, summary in self.data:
            lines += _entry(name, data_lines(summary))
        if self.loss:
            lines += _entry("loss", [self.loss])
        lines += _entry("updates", [self.updates])
        lines += _entry("rate", [self.learning_rate])
        lines += _entry("device", [self.device])
        lines += _entry("directory", [self.directory])
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Footer:
    """The facts of a finished run. Losses that were not measured are None."""

    name: str
    unit: str
    train_loss: float | None
    valid_loss: float | None
    best_loss: float
    n_steps: int
    seconds: float
    directory: Path
    warnings: list[str]
    next_command: str
    objective: str = ""  # where training has another loss than validation

    def text(self) -> str:
        """Return the block of lines."""
        lines = [f"{self.name}: {self.n_steps:,} steps in {duration(self.seconds)}"]
        if self.train_loss is not None:
            what = f"nats/{self.unit} of {self.objective}" if self.objective else f"nats/{self.unit}"
            lines += _entry("training", [f"loss {self.train_loss:.4f} {what} (mean of the last steps)"])
        if self.valid_loss is not None:
            best = "its best" if self.valid_loss == self.best_loss else f"its best {self.best_loss:.4f}"
            best += f" is kept in {self.directory / 'best'}"
            lines += _entry("validation", [f"loss {self.valid_loss:.4f} nats/{self.unit}; {best}"])
        if self.warnings:
            lines += _entry("warnings", self.warnings)
        lines += _entry("saved", [f"{self.directory}"])
        lines += _entry("page", [f"{self.directory / 'summary.html'}"])
        lines += _entry("metrics", [f"{self.directory / 'metrics.jsonl'}"])
        lines += _entry("next", [self.next_command])
        return "\n".join(lines)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _entry(name: str, lines: list[str]) -> list[str]:
    return [f"  {'' if number else name:<15} {line}" for number, line in enumerate(lines)]


def check_rows(rows, args, *, flag: str) -> None:
    """Raise ``UserError`` when more than a tenth of the data was rejected, unless ``--allow_rejected``.

    Args:
        flag: that names the files of ``rows``, for the message.
    """
    check_rejected(rows.summary, flag=flag, allow=args.allow_rejected)
    check_rejected(rows.summary.get("replayed", {}), flag="--replay_path", allow=args.allow_rejected)


def header_of(run) -> Header:
    """Return the header of a run that is about to begin, or to go on, its steps."""
    args, n_ranks, dtype = run.args, run.ranks.world_size, str(run.dtype).removeprefix("torch.")
    splits = [("training data", run.loader)] + ([("validation data", run.valid_loader)] if run.valid_loader else [])
    summaries = [(name, loader.rows.summary) for name, loader in splits]
    summaries += [("replayed data", summary["replayed"]) for _, summary in summaries if "replayed" in summary]
    updates = f"{run.total_steps:,}, each of {run.rows_per_step:,} rows x {args.max_seq_len:,} tokens"
    if args.max_steps:
        updates += f"; --max_steps {args.max_steps}"
    else:
        updates += f"; {_plural(args.epochs, 'epoch')} of {run.loader.steps_per_epoch:,}"
    if run.step:
        updates += f"; resumed at step {run.step:,}"
    warning = "" if args.max_steps else few_updates(run.total_steps, args)
    warmup = f"{_plural(run.n_warmup_steps, 'step')} of warm-up"
    tokenizer = run.tokenizer
    origin = getattr(tokenizer, "origin", "none")
    return Header(
        name=run.directory.name,
        stage=run.stage,
        weights=getattr(run.model, "origin", None) or args.from_weight or f"from scratch, --seed {args.seed}",
        parameters=run.parameters_text,
        tokenizer=f"{origin}, {tokenizer.vocab_size:,} tokens" if tokenizer is not None else origin,
        data=[(name, summary) for name, summary in summaries if summary],
        updates=updates,
        learning_rate=f"{rate(args.learning_rate)}, {args.lr_scheduler}, {warmup}",
        device=f"{run.device}, {dtype}, {_plural(n_ranks, 'rank')} ({args.parallel})",
        directory=str(run.directory),
        warnings=(warning,) if warning else (),
        loss=_loss_text(run.settings),
    )


def _loss_text(settings: dict) -> str:
    """Return which loss of preferences a run has; empty for the others, of which there is one each."""
    if "loss_type" not in settings:
        return ""
    more = settings.get("sft_weight")
    return f"{settings['loss_type']}, beta {settings['beta']:g}" + (
        f", plus {more:g} times the mean loss of a chosen reply's tokens (--sft_weight)" if more else ""
    )


def few_updates(n_updates: int, args) -> str:
    """Return what to change where ``n_updates`` are too few to learn from; empty where they are enough."""
    if n_updates >= FEW_UPDATES:
        return ""
    epochs = -(-FEW_UPDATES * args.epochs // n_updates)
    rows = "lower --batch_size" if not args.global_batch_size else "lower --global_batch_size"
    if args.accumulation_steps > 1:
        rows = f"lower --accumulation_steps (now {args.accumulation_steps})"
    else:
        rows += f" (now {args.global_batch_size or args.batch_size})"
    packed = "" if args.packing == "none" else f", --max_seq_len (now {args.max_seq_len}), or --packing none"
    return (
        f"only {n_updates} updates, where fewer than {FEW_UPDATES} seldom teach anything: raise --epochs (now "
        f"{args.epochs}) to {epochs}, or {rows}{packed} for more, smaller rows"
    )


def footer_of(run) -> Footer:
    """Return the footer of a run that is over."""
    return Footer(
        name=run.directory.name,
        unit=run.unit,
        train_loss=run.last_train_loss,
        valid_loss=run.last_eval.get("loss"),
        best_loss=run.best_loss,
        n_steps=run.step,
        seconds=run.seconds,
        directory=run.directory,
        warnings=run.alarm.messages,
        next_command=next_command(run),
        objective="the distillation loss, while validation is cross-entropy" if run.stage == "distill" else "",
    )


def next_command(run) -> str:
    """Return the command that tries what the run has made."""
    has_chats = getattr(getattr(run.loader.rows, "store", None), "has_mask", run.stage != "pretrain")
    mode = MODES.get(run.stage, 1 if has_chats else 0)
    if not run.output.is_adapter:
        return shlex.join(["python", "eval_model.py", "--from_weight", str(run.directory), "--model_mode", str(mode)])
    base = str(getattr(run.model, "origin", "") or run.args.from_weight)
    words = ["--from_weight", base, "--lora_name", str(run.directory), "--model_mode", "1"]
    if run.args.tokenizer_path:
        words += ["--tokenizer_path", run.args.tokenizer_path]
    return shlex.join(["python", "eval_model.py", *words])
