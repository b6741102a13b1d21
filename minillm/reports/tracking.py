"""Where a run's numbers go: ``metrics.jsonl``, the progress bar or the log, and the trackers of ``--tracker``."""

import contextlib
import json
import time
from pathlib import Path

from tqdm import tqdm

from minillm.errors import UserError
from minillm.files import replace_text
from minillm.hardware import USE
from minillm.reports.trackers import Trackers
from minillm.terminal import shows_progress

CLOCK = ("seconds", "tokens_per_s", "mfu", *USE)  # what differs between the rows of two equal runs


class Tracker:
    """Writes metric rows of one run. Only the main rank has one that is ``enabled``.

    ``begin`` comes before the first row: until then nothing in the directory has changed.

    A row holds ``step, epoch, tokens, loss, lr, grad_norm, tokens_per_s, seconds, split`` and what else is known.
    At a terminal a bar moves; elsewhere every log interval is a line, and no carriage return is written.
    """

    def __init__(self, directory: Path, *, enabled: bool, total_steps: int, first_step: int, name: str):
        self.directory, self.path, self.enabled = directory, directory / "metrics.jsonl", enabled
        self.samples_path = directory / "samples.jsonl"
        self.total_steps, self.first_step = total_steps, first_step
        self._began = time.perf_counter()
        self.trackers: Trackers | None = None
        self.run_ids: dict[str, str] = {}  # of the trackers' runs
        if not enabled:
            return
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0,
            disable=not shows_progress(),
        )  # fmt: skip

    def begin(self, *, after_step: int, without_validation: bool = False) -> None:
        """Drop what ``metrics.jsonl`` and ``samples.jsonl`` hold past ``after_step``; see ``truncate_metrics``."""
        if self.enabled:
            truncate_metrics(self.path, after_step=after_step, without_validation=without_validation)
            if self.samples_path.exists():
                truncate_metrics(self.samples_path, after_step=after_step, without_validation=without_validation)

    def start_trackers(self, names: list[str], *, project: str, config: dict) -> None:
        """Begin runs at some trackers, or continue those of ``run_ids``; see ``Trackers``."""
        if self.enabled:
            settings = {"project": project, "config": config, "run_ids": self.run_ids}
            self.trackers = Trackers(names, self.directory, **settings, report=self.print)
            self.run_ids = self.trackers.run_ids

    def log(self, row: dict) -> None:
        """Append one row to ``metrics.jsonl`` (flushed) and send it to the trackers.

        Raises:
            UserError: the disk is full, say; a run without its numbers is not worth its time.
        """
        if not self.enabled:
            return
        _append(self.path, [row])
        if self.trackers is not None:
            self.trackers.log(row)

    def log_answers(self, rows: list[dict]) -> None:
        """Append the answers of a validation to ``samples.jsonl``: ``step, question, answer, expected``."""
        if self.enabled and rows:
            _append(self.samples_path, rows)

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send pairs (prompt, text) to the trackers."""
        if self.trackers is not None:
            self.trackers.log_samples(samples, step)

    def advance(self) -> None:
        """Move the bar by one step."""
        if self.enabled:
            self.bar.update(1)

    def show(self, step: int, *, epoch: float, **values: str) -> None:
        """Show the numbers of a log interval behind the bar, or as a line with the time left."""
        if not self.enabled:
            return
        if not self.bar.disable:
            self.bar.set_postfix({"epoch": f"{epoch:.2f}"} | values, refresh=False)
            return
        n_left, n_done = self.total_steps - step, max(1, step - self.first_step)
        seconds_left = (time.perf_counter() - self._began) / n_done * n_left
        numbers = {"step": f"{step}/{self.total_steps}", "epoch": f"{epoch:.2f}"} | values
        numbers["eta"] = duration(seconds_left)
        print("  ".join(f"{name} {value}" for name, value in numbers.items()), flush=True)

    def print(self, message: str) -> None:
        """Print a line, above the bar if there is one (main rank only)."""
        if self.enabled and self.bar.disable:
            print(message, flush=True)
        elif self.enabled:
            tqdm.write(message)

    def close(self) -> None:
        """End the bar and the trackers' runs."""
        if self.enabled:
            self.bar.close()
            if self.trackers is not None:
                self.trackers.finish()


def rate(value: float) -> str:
    """Return a learning rate as 4.9e-4, a large one as 0.05."""
    if value == 0 or value >= 1e-2:
        return f"{value:g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Return ``seconds`` as 4:05, or 1:02:03 from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class NoWatch:
    """Where no ``minillm.reports.watch.Watch`` watches: its calls, doing nothing."""

    def before_update(self, step: int) -> None:
        """See the gradients, clipped."""

    def after_update(self, step: int, optimizer) -> None:
        """See what the update did."""

    def finish(self) -> None:
        """Sum up and draw."""

    def sections(self) -> list:
        """Return what the run's page says of it."""
        return []

    def state(self) -> None:
        """Return what a checkpoint keeps."""

    def load_state(self, state: dict | None) -> None:
        """Go on from it."""


def read_metrics(path: Path) -> list[dict]:
    """Return the rows of a ``metrics.jsonl``; a line cut short by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and type(row.get("step")) is int]


def truncate_metrics(path: Path, *, after_step: int, without_validation: bool = False) -> None:
    """Drop the rows past ``after_step``: a resumed run writes them again. Step 0 starts the file afresh.

    Args:
        without_validation: drop the validation of ``after_step`` too, because it is repeated.
    """
    rows = [row for row in read_metrics(path) if row["step"] <= after_step] if after_step else []
    if without_validation:
        rows = [row for row in rows if (row["step"], row.get("split", "valid")) != (after_step, "valid")]
    replace_text(path, "".join(map(_line, rows)))


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _append(path: Path, rows: list[dict]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room there and resume with --from_resume"
        ) from error
