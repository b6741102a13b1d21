"""Measures keeping freed memory: training steps with glibc's own setting and with ``keep_freed_memory``.

    python benchmarks/allocator.py --shape demo --dtype float32

The setting is that of a whole process and cannot be undone, so each measurement has its own process. The processes of
one round follow each other directly, and the ratio is the median of the ratios of each round. The peers' trainers do
not change glibc's setting: the last line compares each side with its own default.
"""

import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

from benchmarks import train_step
from benchmarks.common import format_table, median_ratio, turns, write_json
from minillm.cli.command_line import parse, require, script
from minillm.hardware import keep_freed_memory


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured, and how often."""

    shape: str = "demo"
    """demo or small (26M), as in train_step.py."""
    dtype: str = "float32"
    """float32, or bfloat16 (autocast)."""
    peers: str = "transformers"
    """Comma list of peers to measure besides minillm (empty: none)."""
    rounds: int = 5
    """Rounds; in each, every side runs once with each setting."""
    steps: int = 20
    """Measured steps per process; 5 more come before them."""
    output: str = "out/benchmarks/allocator.json"
    """JSON file for the figures (empty: none)."""
    measure: str = ""
    """Used by the processes this one starts: SIDE:SETTING, prints seconds per step and page faults per step."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        require(self.shape in train_step.SHAPES, f"--shape {self.shape}: choose from {', '.join(train_step.SHAPES)}")
        require(self.dtype in train_step.DTYPES, f"--dtype {self.dtype}: choose from {', '.join(train_step.DTYPES)}")
        for name in ("rounds", "steps"):
            require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)}: must be at least 1")


def measure(args: Arguments) -> None:
    """Print the median seconds of a step, and its page faults."""
    name, setting = args.measure.split(":")
    if setting == "kept":
        keep_freed_memory()
    flags = train_step.Arguments()
    peers = {} if name == "ours" else {name: train_step.PEERS[name]}
    _, sides, batch, _, _ = train_step.set_up(args.shape, args.dtype, flags, peers)
    side = sides[name]
    del sides
    for _ in range(5):
        side.step(batch)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(args.steps):
        side.timed_step(batch)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(median(side.seconds), faults / args.steps)


@script
def main(argv: list[str] | None = None) -> None:
    args = parse(Arguments, argv)
    if args.measure:
        return measure(args)
    names = ["ours", *train_step.installed_peers(args.peers)]
    sides = [f"{name}:{setting}" for name in names for setting in ("default", "kept")]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    faults: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(args.rounds):
        for side in turns(sides, turn):
            flags = {"shape": args.shape, "dtype": args.dtype, "steps": args.steps, "measure": side}
            command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in flags.items())]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            for store, value in zip((seconds, faults), done.stdout.split(), strict=True):
                store[side].append(float(value))
    rows = [["side", "setting", "ms per step", "page faults per step", "default/kept"]]
    for name in names:
        ratio = median_ratio(seconds[f"{name}:default"], seconds[f"{name}:kept"])
        for setting in ("default", "kept"):
            side = f"{name}:{setting}"
            cells = [f"{1000 * median(seconds[side]):.1f}", f"{median(faults[side]):,.0f}"]
            rows.append([name, setting, *cells, f"{ratio:.2f}x" if setting == "kept" else ""])
    print(f"{args.shape}, {args.dtype}\n{format_table(rows)}")
    as_they_come = {n: median_ratio(seconds[f"{n}:default"], seconds["ours:kept"]) for n in names[1:]}
    for name, ratio in as_they_come.items():
        print(f"minillm with its setting against {name} without: {ratio:.2f}x")
    result = {"seconds": seconds, "faults": faults, "as_they_come": as_they_come}
    write_json(args.output, {"arguments": asdict(args), **result})


if __name__ == "__main__":
    main()
