"""``RunRecord``: what a run directory tells about its run, whatever the stage and however far it came."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from minillm.errors import UserError
from minillm.reports.tracking import duration, read_metrics

A_RUN_HAS = "a run has metrics.jsonl and run.yaml, which a training program writes after its first update"
INSIDE_A_RUN = ("checkpoints", "best", "wandb", "swanlab", "tensorboard", "trackio")  # no runs are in there
# Where a run is and how it was started says nothing about what it did.
NOT_COMPARED = {"--run_name", "--save_dir", "--cache_dir", "--overwrite", "--from_resume", "--auto_resume", "--extend",
                "--tracker", "--project", "--use_wandb", "--wandb_project"}  # fmt: skip
# Columns of a validation that are no figure of the model.
COUNTERS = {"step", "epoch", "tokens", "seconds", "loss", "n_targets", "floor"}
NONE = "–"


@dataclass(frozen=True)
class RunRecord:
    """A run as its directory tells it.

    Attributes:
        name: unique among the runs that are shown. rows: of training and validation, by step.
        settings: texts by name; empty if there is no readable ``run.yaml``.
        unit: what the loss counts: token, pair or reply.
    """

    path: Path
    name: str
    rows: list[dict]
    settings: dict[str, str]
    stage: str
    unit: str

    def points(self, split: str, key: str, *, x: str = "step") -> list[tuple[float, float]]:
        """Return (x, value) of all rows of a split that have both as finite numbers."""
        rows = [row for row in self.rows if row["split"] == split]
        return [(row[x], row[key]) for row in rows if is_number(row.get(x)) and is_number(row.get(key))]

    def last(self, split: str, key: str) -> float | None:
        """Return the last value of a figure; None without any."""
        points = self.points(split, key)
        return points[-1][1] if points else None

    @property
    def figures(self) -> list[str]:
        """The names of what validations measured besides the loss."""
        rows = [row for row in self.rows if row["split"] == "valid"]
        names = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
        return [name for name in names if name not in COUNTERS]

    def results(self) -> dict[str, str]:
        """Return the end of the run and its lowest validation loss as (name, text)."""
        last = self.rows[-1] if self.rows else {}
        total, step = self.settings.get("total_steps"), last.get("step", 0)
        valid = self.points("valid", "loss")
        best = min(valid, key=lambda point: point[1], default=None)
        speeds = [value for _, value in self.points("train", "tokens_per_s")]
        memory = [v for key in ("gpu_peak_gib", "cpu_memory_gib") for _, v in self.points("train", key)]
        return {
            "stage": self.stage or NONE,
            "steps": f"{step:,}" if total in (None, f"{step:,}") else f"{step:,} of {total}",
            "training loss": _number(self.last("train", "loss")),
            "validation loss": _number(valid[-1][1] if valid else None),
            "lowest loss": f"{best[1]:.4f} at step {best[0]:,}" if best else NONE,
            "nats per": self.unit if self.rows else NONE,
            "parameters": self.settings.get("n_parameters", NONE),
            "tokens": f"{last['tokens']:,.0f}" if is_number(last.get("tokens")) else NONE,
            "training time": duration(last["seconds"]) if is_number(last.get("seconds")) else NONE,
            "tokens/s": f"{median(speeds):,.0f}" if speeds else NONE,
            "memory": f"{max(memory):.2f} GiB" if memory else NONE,
        }


def is_number(value) -> bool:
    """Return whether a value of a row is a finite number; JSON has NaN, true and texts too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_run(path: Path) -> bool:
    """Return whether a directory holds a run."""
    return (path / "metrics.jsonl").is_file() or (path / "run.yaml").is_file()


def find_runs(directory: Path) -> list[Path]:
    """Return the run directories in and below ``directory``, sorted; runs that were moved to earlier-1 too."""
    found = []
    for here, folders, _ in os.walk(directory):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in INSIDE_A_RUN)
        if is_run(Path(here)):
            found.append(Path(here))
    return found


def runs_of(paths: list[str]) -> list[Path]:
    """Return the run directories that ``paths`` name: a run, or a directory with runs below it; each once.

    Raises:
        UserError: there is no such directory, or no run in it.
    """
    found: dict[Path, Path] = {}
    for text in paths:
        path = Path(text)
        if not path.is_dir():
            what = "is a file; name the directory that it is in" if path.exists() else "no such directory"
            raise UserError(f"{text}: {what}")
        runs = [path] if is_run(path) else find_runs(path)
        if not runs:
            raise UserError(f"{text} is not a run and holds none: {A_RUN_HAS}")
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    return list(found.values())


def read_runs(paths: list[Path], names: list[str]) -> list[RunRecord]:
    """Return what some run directories tell, under the names given."""
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def unique_names(paths: list[Path]) -> list[str]:
    """Return for each path its last parts, as many as it takes to tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    names = []
    for own in parts:
        n = 1
        while n < len(own) and sum(other[-n:] == own[-n:] for other in parts) > 1:
            n += 1
        names.append("/".join(own[-n:]))
    return names


def differences(runs: list[RunRecord]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the settings in which runs differ, each with the text of every run: those that all have, and the others.

    Runs without a readable ``run.yaml`` have "–" everywhere.
    """
    known = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in known for name in run.settings)
    shared, others, seen = {}, {}, set()
    for name in names:
        texts = [run.settings.get(name, NONE) for run in runs]
        # The same difference may have two names: a flag, and what became of it.
        if len({run.settings.get(name) for run in known}) > 1 and name not in NOT_COMPARED and tuple(texts) not in seen:
            seen.add(tuple(texts))
            (shared if all(name in run.settings for run in known) else others)[name] = texts
    return shared, others


def _read_run(path: Path, name: str) -> RunRecord:
    try:
        rows = read_metrics(path / "metrics.jsonl")
    except OSError as error:
        raise UserError(f"cannot read {path / 'metrics.jsonl'}: {error.strerror}") from None
    rows = sorted((row for row in rows if row.get("split") in ("train", "valid")), key=lambda row: row["step"])
    content = read_run_file(path)
    loss = content.get("loss")
    return RunRecord(
        path=path,
        name=name,
        rows=rows,
        settings=_settings(content),
        stage=str(content.get("stage", "")),
        unit=str(loss["unit"]) if isinstance(loss, dict) and "unit" in loss else _unit_of(rows),
    )


def read_run_file(directory: Path) -> dict:
    """Return the content of a run's ``run.yaml``; empty if it is missing or damaged."""
    try:
        content = yaml.safe_load((directory / "run.yaml").read_text(encoding="utf-8"))
    except Exception:  # not only YAMLError and OSError: the library raises others for some invalid values
        return {}
    return content if isinstance(content, dict) else {}


def _settings(content: dict) -> dict[str, str]:
    """Return the settings of a ``run.yaml`` by name: flags as flags, then what became of them."""
    parts = {part: content.get(part) for part in ("arguments", "resolved", "model", "versions", "data")}
    parts = {part: value if isinstance(value, dict) else {} for part, value in parts.items()}
    data = {"data hash": str(parts["data"]["hash"])[:8]} if "hash" in parts["data"] else {}
    return {
        **{name: _text(content[name]) for name in ("stage", "n_parameters") if name in content},
        **{f"--{name}": _text(value) for name, value in parts["arguments"].items()},
        **{str(name): _text(value) for name, value in parts["resolved"].items()},
        **{f"model: {name}": _text(value) for name, value in parts["model"].items()},
        **data,
        **{f"version of {name}": _text(value) for name, value in parts["versions"].items()},
        **({"git revision": str(content["git_revision"])[:8]} if content.get("git_revision") else {}),
    }


def _unit_of(rows: list[dict]) -> str:
    """Return what the loss counts, for runs of versions whose ``run.yaml`` does not say it."""
    keys = {key for row in rows for key in row}
    return "pair" if "reward_chosen" in keys else "reply" if "reward_good" in keys else "token"


def _text(value) -> str:
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"
