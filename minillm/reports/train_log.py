"""``TrainLog``: a run's numbers between two rows of metrics, and the rows, lines and warnings made of them."""

from collections.abc import Callable

from minillm.hardware import HardwareUse
from minillm.reports.divergence import LossAlarm
from minillm.reports.tracking import Tracker, rate


class TrainLog:
    """Adds up steps; writes a row of metrics and shows a line at each log interval; warns when the loss diverges.

    Args:
        mfu: from tokens per second over all ranks to the share of the device's peak that the model's FLOPs take, or
            None where the peak is unknown.
        hardware: what the main rank's process and device are doing, for the rows; asked once per row.

    Attributes:
        window: sums since the last row. last_loss: of the last row of training.
    """

    def __init__(
        self, tracker: Tracker, alarm: LossAlarm, *, mfu: Callable[[float], float | None], hardware: HardwareUse
    ):
        self.tracker, self.alarm, self.mfu, self.hardware = tracker, alarm, mfu, hardware
        self.last_loss: float | None = None
        self.window = _empty_window()

    def print(self, message: str) -> None:
        """Print a line (main rank only)."""
        self.tracker.print(message)

    def warn(self, message: str | None) -> None:
        """Print a warning, or a note where the message says so; None prints nothing."""
        if message is not None:
            self.print(message if message.startswith("note: ") else f"warning: {message}")

    def add_time(self, n_tokens: int, seconds: float) -> None:
        """Add a step's tokens and time."""
        self.window["tokens"] += n_tokens
        self.window["seconds"] += seconds
        self.tracker.advance()

    def add_loss(self, step: int, loss_sum: float, n_targets: float) -> None:
        """Add the loss of a step whose update was applied."""
        self.window["loss_sum"] += loss_sum
        self.window["n_targets"] += n_targets
        if n_targets:
            self.warn(self.alarm.train(step, loss_sum / n_targets))

    def train_row(self, progress, *, epochs: float, memory_bytes: int, **values) -> None:
        """Write and show the row of the steps since the last one, and start over.

        Args:
            progress: ``Progress`` of the run. epochs: passed, with their fraction. values: further columns of the row.
        """
        window, self.window = self.window, _empty_window()
        loss = window["loss_sum"] / window["n_targets"] if window["n_targets"] else None  # every step was skipped
        self.last_loss = loss
        tokens_per_s = window["tokens"] / max(window["seconds"], 1e-9)
        mfu = self.mfu(tokens_per_s)
        row = _row("train", progress, loss) | {name: values.pop(name) for name in ("lr", "grad_norm")}
        row |= {"tokens_per_s": round(tokens_per_s, 1)} | ({} if mfu is None else {"mfu": round(mfu, 4)}) | values
        if self.tracker.enabled:
            row |= self.hardware.row()
        self.tracker.log(row)
        shown = {"loss": "skipped" if loss is None else f"{loss:.4f}", "lr": rate(row["lr"])}
        shown |= {"tok/s": f"{tokens_per_s:,.0f}", "mem": f"{memory_bytes / 2**30:.2f}G"}
        shown |= {} if mfu is None else {"mfu": f"{mfu:.0%}"}
        self.tracker.show(progress.step, epoch=epochs, **shown)

    def valid_row(self, progress, result: dict, *, unit: str, figures: str = "") -> None:
        """Write and show the row of a validation.

        Args:
            result: of ``evaluate_loss``. unit: what the loss counts. figures: what else the line shows.
        """
        self.tracker.log(_row("valid", progress, result["loss"]) | result)
        text = f"step {progress.step}: validation loss {result['loss']:.4f} nats/{unit}"
        if "bits_per_byte" in result:
            text += f", {result['bits_per_byte']:.4f} bits/byte"
        if "floor" in result:
            text += f", {result['loss'] - result['floor']:.4f} above the floor"
        self.print(text + figures)
        self.warn(self.alarm.valid(progress.step, result["loss"]))


def _empty_window() -> dict:
    return {"loss_sum": 0.0, "n_targets": 0.0, "tokens": 0, "seconds": 0.0}


def _row(split: str, progress, loss: float | None) -> dict:
    counters = {"step": progress.step, "epoch": progress.epoch, "tokens": progress.tokens, "split": split}
    return counters | {"loss": loss, "seconds": round(progress.seconds, 3)}
