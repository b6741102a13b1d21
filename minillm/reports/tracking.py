"""Where a run's numbers go: ``metrics.jsonl``, the progress bar or the log, and Weights & Biases if asked."""

import contextlib
import json
import os
import time
from pathlib import Path

from tqdm import tqdm

from minillm.errors import UserError, missing_package
from minillm.terminal import shows_progress


class Tracker:
    """Writes metric rows of one run. Only the main rank has one that is ``enabled``.

    ``begin`` comes before the first row: until then nothing in the directory has changed.

    A row holds ``step, epoch, tokens, loss, lr, grad_norm, tokens_per_s, seconds, split`` and what else is known.
    At a terminal a bar moves; elsewhere every log interval is a line, and no carriage return is written.
    """

    def __init__(self, directory: Path, *, enabled: bool, total_steps: int, first_step: int, name: str):
        self.directory, self.path, self.enabled = directory, directory / "metrics.jsonl", enabled
        self.total_steps, self.first_step = total_steps, first_step
        self._began = time.perf_counter()
        self.wandb = None
        self.run_id: str | None = None
        self._sent: dict[str, int] = {}  # the last step of each split that wandb's run has
        if not enabled:
            return
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=name, unit="step", dynamic_ncols=True, mininterval=1.0,
            disable=not shows_progress(),
        )  # fmt: skip

    def begin(self, *, after_step: int, without_validation: bool = False) -> None:
        """Drop what ``metrics.jsonl`` holds past ``after_step``; see ``truncate_metrics``."""
        if self.enabled:
            truncate_metrics(self.path, after_step=after_step, without_validation=without_validation)

    def start_wandb(self, *, project: str, config: dict, run_id: str | None) -> None:
        """Begin (or, with ``run_id``, continue) a run at Weights & Biases.

        Raises:
            UserError: wandb is not installed, or cannot start (not logged in, say).
        """
        if not self.enabled:
            return
        try:
            import wandb
        except ImportError:
            raise missing_package("wandb", purpose="--use_wandb", extra="track") from None
        try:
            self.wandb = wandb.init(
                project=project,
                name=self.directory.name,
                config=config,
                dir=str(self.directory),
                id=run_id,
                resume="allow" if run_id else None,
            )
        except Exception as error:  # not logged in, no network, a refused project: wandb has an error for each
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--use_wandb: wandb cannot start ({reason}); run `wandb login`, set WANDB_MODE=offline, or leave the "
                f"flag out"
            ) from error
        self.run_id = self.wandb.id
        self._sent = _read_sent(self._sent_path())

    def log(self, row: dict) -> None:
        """Append one row to ``metrics.jsonl`` (flushed) and send it on.

        A run that resumes from a checkpoint makes some rows again. The file has lost them, wandb has not: what an
        earlier process has sent is not sent twice.

        Raises:
            UserError: the disk is full, say; a run without its numbers is not worth its time.
        """
        if not self.enabled:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room there and resume with --from_resume"
            ) from error
        if self.wandb is not None and row["step"] > self._sent.get(row["split"], -1):
            prefix = row["split"]
            self._sent[prefix] = row["step"]
            _replace(self._sent_path(), json.dumps(self._sent))
            values = {f"{prefix}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
            self.wandb.log(values, step=row["step"])

    def _sent_path(self) -> Path:
        """Return where it stands what wandb's run has; several processes in turn may have sent to it."""
        return self.directory / "wandb" / f"sent-{self.run_id}.json"

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
        """End the bar and the tracker's run."""
        if self.enabled:
            self.bar.close()
            if self.wandb is not None:
                self.wandb.finish()


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
        rows = [row for row in rows if (row["step"], row.get("split")) != (after_step, "valid")]
    _replace(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_sent(path: Path) -> dict[str, int]:
    try:
        return {str(split): int(step) for split, step in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # nothing has been sent
        return {}


def _replace(path: Path, text: str) -> None:
    """Write a file that is whole or as it was, whenever the process is killed."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
