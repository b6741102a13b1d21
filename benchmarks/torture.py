"""Kills runs of every stage at random moments, resumes them until they are done, and compares them bit for bit.

    python benchmarks/torture.py --kills 100

One run of each stage is undisturbed; others are killed (SIGKILL) at random times and at random calls that write to the
disk, asked to stop (SIGTERM, SIGINT), and resumed. In between, checkpoints are damaged and incomplete ones are left
behind. The settings of saving change from resume to resume: in the background or not, by steps or by time, with workers
or without. At the end everything that does not depend on the clock must be equal: weights, optimizer, random
generators, counters, rows of metrics, best weights, exported model; and no complete checkpoint may vanish on the way.
"""

import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of a parent have no place in a forked child
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._dynamo  # the first optimizer imports it

import train_distill  # noqa: F401 - imported here, so that no child has to
import train_dpo  # noqa: F401
import train_lora  # noqa: F401
import train_pretrain  # noqa: F401
import train_reason  # noqa: F401
import train_sft  # noqa: F401
from benchmarks import torture_runs as runs
from benchmarks.common import write_json
from benchmarks.torture_child import IN_LOOP, POINTS, Ended, Plan, damage, litter, run_stage
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints
from minillm.cli.command_line import parse, require, script
from minillm.errors import UserError
from minillm.reports.tracking import read_metrics

MAX_DIFFERENCES = 10  # it ends after so many
KILLS = {"time": "kills at a random time", "call": "kills in a call", "signal": "signals"}
COUNTS = {
    "resumes": "resumes", "anew": "started over", "written": "checkpoints written", "damaged": "damaged by us",
    "skipped": "skipped", "temporary": "temporary files removed", "mismatches": "mismatches", "rows lost": "rows lost",
    "bytes lost": "bytes lost",
}  # fmt: skip


class Difference(Exception):
    """A run that was killed and resumed differs from the undisturbed run."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Kill and resume runs of every stage, and compare them with undisturbed runs."""

    kills: int = 100
    """Number of kills, over all stages."""
    seed: int = 0
    """Seed of all events; the moment of a kill by time also depends on the machine."""
    kills_per_run: int = 5
    """Largest number of kills of one run."""
    variants: str = "all"
    """The runs, separated by semicolons, or all."""
    save_dir: str = ""
    """Directory of the runs (default: a temporary one); runs with a difference are kept."""
    output: str = "docs/torture.md"
    """File for the report (empty: none)."""
    json: str = "out/benchmarks/torture.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in ("kills", "kills_per_run"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")
        require(hasattr(os, "fork"), "this system has no fork")
        for name in self.names:
            require(name in runs.VARIANTS, f"--variants {name}: choose from {'; '.join(runs.VARIANTS)}")

    @property
    def names(self) -> list[str]:
        """Return the names of the runs."""
        return list(runs.VARIANTS) if self.variants == "all" else self.variants.split(";")


class Variant:
    """One stage with its flags: the undisturbed run, and the runs that are killed."""

    def __init__(self, name: str, place: Path, data: Path, rng: random.Random):
        self.name, self.place, self.data, self.rng = name, place, data, rng
        self.stage = runs.VARIANTS[name][0]
        self.slug = re.sub(r"\W+", "_", name)
        self.counts: Counter = Counter()
        self.points: Counter = Counter()

    def leave_alone(self) -> None:
        """Do the undisturbed run, with which the others are compared."""
        out = self.place / f"{self.slug}_whole"
        ended = run_stage(self.stage, runs.command(self.name, self.data, out), Plan(), out)
        if ended.code:
            raise UserError(f"{self.name} ended with {ended.code} although it was undisturbed: {ended.err[-1500:]}")
        self.expected, self.loop_seconds, self.calls = runs.outcome(out, 2), ended.seconds, ended.calls
        for name in ("damaged or surplus checkpoints", "temporary files"):
            if self.expected[name]:
                raise UserError(f"{self.name}, undisturbed, has left {name}: {self.expected[name]}")
        shutil.rmtree(out)

    def torture(self, number: int, n_kills: int) -> None:
        """Kill and resume one run ``n_kills`` times, let it end, and compare.

        Raises:
            Difference: with the first difference; the directory is kept.
        """
        out = self.place / f"{self.slug}_{number}"
        tortured = Tortured(self, out, keep_last=self.rng.choice([1, 2, 2, 3]))
        try:
            is_unfinished = True
            while is_unfinished:
                is_unfinished = tortured.attempt(self.plan(out) if n_kills > tortured.n_kills else Plan())
                if not is_unfinished and n_kills > tortured.n_kills and self.rng.random() < 0.3:
                    is_unfinished = True  # a finished run may be started again, after losing its last checkpoint
                    tortured.disturb()
            found = runs.outcome(out, tortured.keep_last)
            if difference := runs.first_difference(found, self.expected):
                raise Difference(difference)
        except Difference:
            self.counts["mismatches"] += 1
            raise
        finally:
            out.with_suffix(".json").write_text(json.dumps(tortured.history, indent=1))
        shutil.rmtree(out)
        for file in self.place.glob(f"{out.name}.*"):
            file.unlink()

    def plan(self, out: Path) -> Plan:
        """Return how the next run of ``out`` shall end."""
        rng, kind = self.rng, self.rng.random()
        intact = runs.intact_checkpoints(runs.run_directory(out) or out)
        left = max(0.2, 1 - max([step_of(name) for name in intact], default=0) / runs.STEPS)
        numbers = (rng.choice([signal.SIGTERM, signal.SIGINT]),)
        numbers *= 1 + (rng.random() < 0.1)
        if kind < 0.3:
            return Plan("time", share=-rng.random() if rng.random() < 0.15 else rng.random() * left * 1.1)
        if kind < 0.75:
            point = rng.choice([point for point in POINTS if self.calls.get(point)])
            call = 1 + int(rng.random() * max(1, self.calls[point] * left))
            return Plan("call", point, call, rng.choice(["before", "half", "after"]))
        if kind < 0.9:
            point = rng.choice(IN_LOOP)
            call = 1 + int(rng.random() * max(1, self.calls[point] * left))
            return Plan("own signal", point, call, numbers=numbers, to_group=rng.random() < 0.3)
        return Plan("signal", share=rng.random() * left, numbers=numbers, to_group=rng.random() < 0.3)


class Tortured:
    """One run that is killed several times, and its history."""

    def __init__(self, variant: Variant, out: Path, *, keep_last: int):
        self.variant, self.out, self.keep_last, self.rng = variant, out, keep_last, variant.rng
        self.n_kills, self.history, self.said_command = 0, [], None
        self.by_us, self.going = set(), set()  # names of checkpoints that are damaged, or half removed

    def attempt(self, plan: Plan) -> bool:
        """Start or resume the run, and check its files; return whether it is unfinished.

        Raises:
            Difference: something is not as it was promised.
        """
        variant, counts = self.variant, self.variant.counts
        flags = runs.habits(self.rng) | {"keep_last": self.keep_last}
        argv = [*runs.command(variant.name, variant.data, self.out, **flags), "--auto_resume"]
        if self.said_command and self.rng.random() < 0.5:
            argv = shlex.split(self.said_command)[2:]
        before = self.look()
        self.history.append({"argv": shlex.join(argv), "plan": asdict(plan), "before": before})
        ended = run_stage(variant.stage, argv, plan, self.out, loop_seconds=variant.loop_seconds)
        now = self.look()
        self.history[-1] |= {"code": ended.code, "events": ended.events, "after": now}
        counts["written"] += ended.events.count("c")
        counts["temporary"] += len(set(before["temporary"]) - set(now["temporary"]))
        if "b" in ended.events and len(self.history) > 1:
            counts["resumes" if before["intact"] else "anew"] += 1
        self.check_end(plan, ended, now)
        self.check_start(ended, before)
        self.check_checkpoints(before, now)
        self.check_rows(now)
        if broken := runs.broken_weights(self.out):
            raise Difference(f"a file that is not whole under its last name: {broken[0]}")
        if not ended.code:
            return False
        self.n_kills += 1
        counts[plan.kind.removeprefix("own ")] += 1
        if plan.point:
            variant.points[plan.point] += 1
        self.disturb()
        return True

    def look(self) -> dict:
        """Return the content of the run's directory: intact, damaged and temporary checkpoints."""
        directory = runs.run_directory(self.out) or self.out
        intact = runs.intact_checkpoints(directory)
        others = [path.name for path in list_checkpoints(directory / "checkpoints") if path.name not in intact]
        temporary = [path.name for path in (directory / "checkpoints").glob(".step-*")]
        self.by_us, self.going = self.by_us - set(intact), self.going - set(intact)
        return {"intact": intact, "damaged": others, "temporary": temporary}

    def disturb(self) -> None:
        """Sometimes damage files of the run, or add incomplete checkpoints."""
        checkpoints = (runs.run_directory(self.out) or self.out) / "checkpoints"
        if self.rng.random() < 0.35:
            for name in list(self.look()["intact"])[: self.rng.choice([1, 1, 1, 2])]:
                self.history[-1].setdefault("damage", []).append(f"{name}: {damage(checkpoints / name, self.rng)}")
                if find_damage(checkpoints / name):  # a bit of the manifest's blanks means nothing
                    self.by_us.add(name)
                    self.variant.counts["damaged"] += 1
        if checkpoints.is_dir() and self.rng.random() < 0.2:
            litter(checkpoints, self.rng)
        if not self.look()["intact"]:
            self.said_command = None  # with --from_resume, which insists on a checkpoint

    def check_end(self, plan: Plan, ended: Ended, now: dict) -> None:
        """Check the exit code against the plan, and the message of a run that was asked to stop."""
        is_asked = "signal" in plan.kind
        in_loop = "b" in ended.events and "e" not in ended.events
        is_patient = in_loop and len(plan.numbers) == 1  # a second signal ends a run at once
        self.said_command = None
        if ended.hangs:
            raise Difference("it hangs")
        if ended.code == 0 or (ended.code == -signal.SIGKILL and plan.kind in ("time", "call")):
            return
        said = re.search(r"SIG\w+: saved after step (\d+) of \d+\nresume with: (.*)", ended.err)
        if is_asked and said and ended.code in (128 + number for number in plan.numbers):
            newest = next(iter(now["intact"]), "")
            if not newest or step_of(newest) != int(said[1]):
                raise Difference(f"it says that it is saved after step {said[1]}, but the newest one is {newest}")
            self.said_command = said[2]
        elif not is_asked or is_patient or ended.code not in (-plan.numbers[0], 128 + plan.numbers[0]):
            raise Difference(f"it ended with {ended.code}: {ended.err[-1500:]}")

    def check_start(self, ended: Ended, before: dict) -> None:
        """Check that it resumed from the newest intact checkpoint, and named every newer damaged one."""
        if "b" not in ended.events:
            return
        newest = next(iter(before["intact"]), "")
        for name in before["damaged"]:
            if name > newest:
                if not re.search(rf"{name} is damaged", ended.err):
                    raise Difference(f"{name} is damaged and was not named")
                self.variant.counts["skipped"] += 1
        resumed = re.search(r"resumed from \S*(step-\d+)", ended.out)
        if (resumed[1] if resumed else "") != newest:
            raise Difference(f"resumed from {resumed and resumed[1]} instead of {newest or 'nothing'}")

    def check_checkpoints(self, before: dict, now: dict) -> None:
        """Check that checkpoints with a final name are complete, and that only ``--keep_last`` removes them."""
        for name, n_bytes in before["intact"].items():
            if name not in now["intact"] and sum(newer > name for newer in now["intact"]) < self.keep_last:
                self.variant.counts["bytes lost"] += n_bytes
                raise Difference(f"{name} was whole and is gone; --keep_last {self.keep_last}, left: {now}")
        for name in now["damaged"]:
            if sum(newer > name for newer in now["intact"]) >= self.keep_last:
                self.going.add(name)  # killed while it was removed
            if name not in self.by_us | self.going:
                raise Difference(f"{name} is not whole, and nobody has damaged it")

    def check_rows(self, now: dict) -> None:
        """Check that every row up to the newest complete checkpoint exists exactly once."""
        directory, newest = runs.run_directory(self.out), next(iter(now["intact"]), "")
        if not newest:
            return
        for file, name, read in (
            ("metrics.jsonl", "rows of metrics", runs.rows_of),
            ("monitor.jsonl", "looks at the adapter", read_metrics),
        ):
            found, expected = (
                [row for row in rows if row["step"] <= step_of(newest)]
                for rows in (read(directory / file), self.variant.expected[name])
            )
            # A checkpoint comes before the validation of its step, which a kill may have cut short.
            pending = [row for row in expected if (row["step"], row.get("split")) == (step_of(newest), "valid")]
            if not [row for row in found if row in pending]:
                expected = [row for row in expected if row not in pending]
            if difference := runs.first_difference(found, expected):
                self.variant.counts["rows lost"] += sum(row not in found for row in expected)
                raise Difference(f"{name} up to {newest}: {difference}")


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint."""
    return int(name.rpartition("-")[2])


# ---- the report --------------------------------------------------------------------------------------------------


def table(variants: list[Variant]) -> str:
    """Return the figures of all stages, and their sums, as a table in markdown."""
    names = [*KILLS, *COUNTS]
    total = sum((variant.counts for variant in variants), Counter())
    lines = ["| run | " + " | ".join([*KILLS.values(), *COUNTS.values()]) + " |", "|---|" + "--:|" * len(names)]
    for name, counts in [*((variant.name, variant.counts) for variant in variants), ("**all**", total)]:
        lines.append(f"| {name} | " + " | ".join(f"{counts[key]:,}" for key in names) + " |")
    return "\n".join(lines)


def report(args: Arguments, variants: list[Variant], differences: list[str], seconds: float) -> str:
    """Return the page of the report."""
    total = sum((variant.counts for variant in variants), Counter())
    points = sum((variant.points for variant in variants), Counter())
    kills = sum(total[kind] for kind in KILLS)
    result = "nothing differs" if not differences else f"{len(differences)} differ; the first: {differences[0]}"
    return "\n\n".join(
        [
            "# Killed and resumed",
            " ".join(__doc__.split("\n\n", 1)[0].split()) + f" {kills} kills in {seconds:.0f} s: **{result}**.",
            f"```bash\npython benchmarks/torture.py --kills {args.kills} --seed {args.seed}\n```",
            table(variants),
            "What the columns count:",
            "* *Kills at a random time*, *kills in a call*: SIGKILL, from outside, or at a random call of a function "
            "that writes: before, during or after it.\n"
            "* *Signals*: SIGTERM or SIGINT; the run must save, print the command that resumes it, and exit with 143 "
            "or 130.\n"
            "* *Started over*: no intact checkpoint was left.\n"
            "* *Damaged by us*: a bit flipped, a file cut short or deleted. The checkpoint must be named and *skipped* "
            "when the run is resumed (it may be skipped again at the next resume).\n"
            "* *Rows lost*: of metrics, before the newest intact checkpoint.\n"
            "* *Bytes lost*: of intact checkpoints that were not removed by `--keep_last`.",
            "Calls in which runs were killed or signalled: "
            + ", ".join(f"{name} {number}" for name, number in points.most_common())
            + f". {os.cpu_count()} CPU cores, torch {torch.__version__}, one thread.",
        ]
    )


def main_loop(args: Arguments, place: Path) -> tuple[list[Variant], list[str]]:
    """Kill runs until the number of kills is reached; return the variants with their counts, and the differences."""
    data = place / "data"
    data.mkdir()
    rng = random.Random(args.seed)
    variants = [Variant(name, place, data, random.Random(rng.random())) for name in args.names]
    runs.make_data(data)
    for variant in variants:
        variant.leave_alone()
    differences: list[str] = []
    kills, number = 0, 0
    while (kills < args.kills or number < len(variants)) and len(differences) < MAX_DIFFERENCES:
        variant = variants[number % len(variants)]
        before = sum(variant.counts[kind] for kind in KILLS)
        wanted = max(1, min(rng.randint(1, args.kills_per_run), args.kills - kills))
        try:
            variant.torture(number, wanted)
        except Difference as difference:
            differences.append(f"{variant.name}, run {number}: {difference}")
            print(f"{differences[-1]}\n  kept: {place / f'{variant.slug}_{number}'}*", file=sys.stderr)
        kills += sum(variant.counts[kind] for kind in KILLS) - before
        number += 1
        print(f"\r{kills} of {args.kills} kills, {number} runs", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return variants, differences


@script
def main(argv: list[str] | None = None) -> int:
    args = parse(Arguments, argv)
    torch.set_num_threads(1)
    place = Path(args.save_dir or tempfile.mkdtemp(prefix="torture_")) / f"seed_{args.seed}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    began = time.monotonic()
    variants, differences = main_loop(args, place)
    seconds = time.monotonic() - began
    print(table(variants))
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(report(args, variants, differences, seconds) + "\n", encoding="utf-8")
    counts = {variant.name: dict(variant.counts) | {"points": dict(variant.points)} for variant in variants}
    figures = {"seconds": seconds, "differences": differences, "counts": counts, "cores": os.cpu_count()}
    write_json(args.json, {"arguments": {"kills": args.kills, "seed": args.seed}, **figures})
    if differences:
        raise SystemExit(1)
    shutil.rmtree(place if args.save_dir else place.parent)
    return 0


if __name__ == "__main__":
    main()
