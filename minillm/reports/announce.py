"""The blocks of text that a run prints at its start and at its end: the header and the footer."""

from dataclasses import dataclass
from pathlib import Path

from minillm.data.report import data_lines
from minillm.data.sources.rejects import check_rejected
from minillm.reports.tracking import duration


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
    metrics: str = ""  # of the validations, where they are more than the loss

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
        if self.metrics:
            lines += _entry("metrics", [self.metrics])
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
    metrics: str  # the other metrics of the last validation, as text
    best: str  # the best value of the criterion and its step; empty without a validation
    early_stop: str  # why the run ended before its last step; empty if it did not
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
            lines += _entry("validation", [f"loss {self.valid_loss:.4f} nats/{self.unit}{self.metrics}"])
        if self.best:
            lines += _entry("best", [f"{self.best}, kept in {self.directory / 'best'}"])
        if self.early_stop:
            lines += _entry("ended", [self.early_stop])
        if self.warnings:
            lines += _entry("warnings", self.warnings)
        lines += _entry("saved", [f"{self.directory}"])
        lines += _entry("page", [f"{self.directory / 'summary.html'}"])
        lines += _entry("metrics", [f"{self.directory / 'metrics.jsonl'}"])
        lines += _entry("next", [self.next_command])
        return "\n".join(lines)


def _entry(name: str, lines: list[str]) -> list[str]:
    return [f"  {'' if number else name:<15} {line}" for number, line in enumerate(lines)]


def check_rows(rows, *, allow: bool, flag: str) -> None:
    """Raise ``UserError`` when more than a tenth of the data was rejected, unless that is allowed.

    Args:
        allow: ``--allow_rejected``. flag: the one that names the files of ``rows``, for the message.
    """
    check_rejected(rows.summary, flag=flag, allow=allow)
    check_rejected(rows.summary.get("replayed", {}), flag="--replay_path", allow=allow)
