"""Programs that show a run's curves in a browser: Weights & Biases, SwanLab, TensorBoard and Trackio.

They stand behind one small face, ``TrackedRun``. Each is optional and imported when a run starts with it. What they get
is in ``metrics.jsonl`` too, so a tracker that fails while the model trains costs a warning and not the run.
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import yaml

from minillm.errors import UserError, missing_package
from minillm.files import replace_text


class TrackedRun(Protocol):
    """A run at one tracker. Making an object begins a run, or continues the run ``run_id``.

    Attributes:
        package: what to install. advice: what to do if it cannot start. run_id: what a resume continues.
    """

    package: str
    advice: str
    run_id: str

    def __init__(self, directory: Path, *, project: str, config: dict, run_id: str | None): ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the figures of a step, by names such as train/loss."""

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send pairs (prompt, text)."""

    def finish(self) -> None:
        """Send what is left and end the run."""


class WandbRun:
    """Weights & Biases. Its files are in the run directory, under ``wandb``."""

    package, advice = "wandb", "run `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, directory: Path, *, project: str, config: dict, run_id: str | None):
        import wandb

        resume = "allow" if run_id else None
        self._run = wandb.init(
            project=project, name=directory.name, config=config, dir=str(directory), id=run_id, resume=resume
        )
        self._table, self.run_id = wandb.Table, self._run.id

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        self._run.log(values, step=step)

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send a table."""
        table = self._table(columns=["prompt", "text"], data=[list(sample) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class SwanLabRun:
    """SwanLab. Its files are in the run directory, under ``swanlab``."""

    package, advice = "swanlab", "run `swanlab login`, or set SWANLAB_MODE=offline"

    def __init__(self, directory: Path, *, project: str, config: dict, run_id: str | None):
        import swanlab

        if os.environ.get("SWANLAB_MODE") == "local" and find_spec("swanboard") is None:
            raise missing_package("swanlab[dashboard]", purpose="SWANLAB_MODE=local")  # it would keep nothing
        log_dir = directory / "swanlab"
        log_dir.mkdir(parents=True, exist_ok=True)
        resume = "allow" if run_id else None
        self._run = swanlab.init(
            project=project, name=directory.name, config=config, log_dir=str(log_dir), id=run_id, resume=resume
        )
        self._text, self.run_id = swanlab.Text, self._run.id

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        self._run.log(values, step=step)

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send texts, each with its prompt below it."""
        self._run.log({"samples": [self._text(text or " ", caption=prompt) for prompt, text in samples]}, step=step)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class TensorBoardRun:
    """TensorBoard: event files in the run directory, under ``tensorboard/<run_id>``; no account, no network."""

    package, advice = "tensorboard", "make the run directory writable"

    def __init__(self, directory: Path, *, project: str, config: dict, run_id: str | None):
        from torch.utils.tensorboard import SummaryWriter

        self.run_id = run_id or _new_id()
        self._writer = SummaryWriter(str(directory / "tensorboard" / self.run_id))
        if run_id is None:
            self._writer.add_text("settings", _as_code(yaml.safe_dump(config, sort_keys=False, allow_unicode=True)), 0)

    def log(self, values: dict[str, float], step: int) -> None:
        """Write the figures of a step; they are on disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Write texts."""
        for number, (prompt, text) in enumerate(samples):
            self._writer.add_text(f"samples/{number}", _as_code(f"{prompt}\n\n{text}"), step)

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class TrackioRun:
    """Trackio: a database in TRACKIO_DIR, by default in the user's cache, shown by ``trackio show``.

    A run is continued by its name, which therefore contains the id: other directories may have the same name.
    """

    package, advice = "trackio", "make TRACKIO_DIR writable, or unset TRACKIO_SPACE_ID and TRACKIO_SERVER_URL"

    def __init__(self, directory: Path, *, project: str, config: dict, run_id: str | None):
        import trackio

        resume = "allow" if run_id else "never"
        self.run_id = run_id or f"{directory.name}-{_new_id()}"
        self._run = trackio.init(
            project=project, name=self.run_id, config=config, resume=resume, embed=False,
            auto_log_cpu=False, auto_log_gpu=False,  # the rows have these figures
        )  # fmt: skip
        self._text, self._finish = trackio.Markdown, trackio.finish

    def log(self, values: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        self._run.log(values, step=step)

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send texts."""
        texts = {
            f"samples/{n}": self._text(_as_code(f"{prompt}\n\n{text}")) for n, (prompt, text) in enumerate(samples)
        }
        self._run.log(texts, step=step)

    def finish(self) -> None:
        """Write what is left."""
        self._finish()


TRACKERS: dict[str, type[TrackedRun]] = {
    "wandb": WandbRun, "swanlab": SwanLabRun, "tensorboard": TensorBoardRun, "trackio": TrackioRun
}  # fmt: skip


class Trackers:
    """All trackers of a run. Each gets every row once, whatever was killed and resumed; one that fails is left out.

    Args:
        names: of ``TRACKERS``. directory: of the run. project, config: what the trackers show next to the curves.
        run_ids: by tracker; of the runs to continue. report: prints a line.

    Attributes:
        run_ids: by tracker, for the checkpoints.

    Raises:
        UserError: a tracker is not installed, or cannot start; the others are ended again.
    """

    def __init__(
        self,
        names: list[str],
        directory: Path,
        *,
        project: str,
        config: dict,
        run_ids: dict[str, str],
        report: Callable[[str], None],
    ):
        self.directory, self.report = directory, report
        self.run_ids = dict(run_ids)  # also of trackers that are not used this time
        self._runs: dict[str, TrackedRun] = {}
        self._sent: dict[str, dict[str, int]] = {}  # by tracker: the last step of each split that it has
        for name in names:
            try:
                run = _start(name, directory, project=project, config=config, run_id=run_ids.get(name))
            except BaseException:
                self.finish()
                raise
            self._runs[name], self.run_ids[name] = run, run.run_id
            self._sent[name] = _read_sent(self._sent_path(name))

    def log(self, row: dict) -> None:
        """Send a row of metrics.

        A run that resumes from a checkpoint makes some rows again. ``metrics.jsonl`` has lost them, a tracker has not.
        """
        split, step = row["split"], row["step"]
        values = {f"{split}/{key}": value for key, value in row.items() if isinstance(value, int | float)}
        self._send(split, step, lambda run: run.log(values, step))

    def log_samples(self, samples: list[tuple[str, str]], step: int) -> None:
        """Send pairs (prompt, text)."""
        if samples:
            self._send("samples", step, lambda run: run.log_samples(samples, step))

    def finish(self) -> None:
        """End the trackers' runs."""
        for name in list(self._runs):
            self._try(name, lambda run: run.finish())
        self._runs = {}

    def _send(self, split: str, step: int, send: Callable[[TrackedRun], None]) -> None:
        for name in list(self._runs):
            if step > self._sent[name].get(split, -1):
                self._sent[name][split] = step
                self._try(name, lambda run, name=name: (self._write_sent(name), send(run)))

    def _try(self, name: str, call: Callable[[TrackedRun], object]) -> None:
        try:
            call(self._runs[name])
        except Exception as error:  # no network, a full disk, a server's answer: each package has errors of its own
            del self._runs[name]
            self.report(
                f"warning: {name} failed ({_reason(error)}) and gets nothing more; training goes on, and metrics.jsonl "
                "has every row"
            )

    def _write_sent(self, name: str) -> None:
        replace_text(self._sent_path(name), json.dumps(self._sent[name]))

    def _sent_path(self, name: str) -> Path:
        """Return the file that says what a tracker's run has; several processes in turn may have sent to it."""
        return self.directory / name / f"sent-{self.run_ids[name]}.json"


def _start(name: str, directory: Path, *, project: str, config: dict, run_id: str | None) -> TrackedRun:
    kind = TRACKERS[name]
    try:
        return kind(directory, project=project, config=config, run_id=run_id)
    except UserError:
        raise
    except Exception as error:  # not installed, not logged in, no network, a refused project
        if isinstance(error, ModuleNotFoundError) and error.name == kind.package:
            raise missing_package(kind.package, purpose=f"--tracker {name}", extra="track") from None
        raise UserError(
            f"--tracker {name}: {name} cannot start ({_reason(error)}); {kind.advice}, or leave the flag out"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_sent(path: Path) -> dict[str, int]:
    try:
        return {str(split): int(step) for split, step in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):  # nothing has been sent
        return {}


def _new_id() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _as_code(text: str) -> str:
    """Return ``text`` as an indented block of Markdown, which shows it as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
