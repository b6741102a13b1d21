"""Measures what checkpoints cost a run: without saving, saving in the background, and saving while the training waits.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --shapes small --rounds 5

One run, in which blocks of steps take turns: one without a checkpoint, one with a checkpoint after its first step that
is written in the background (``--async_save 1``), and one where the training waits for it (``--async_save 0``). A
block ends when its checkpoint is complete. The cost of a save is the difference to the block without; the overhead at
an interval of 50 steps is that over the time of 50 steps. Also measured: how long the call itself blocks the training
(the copy), how long the writing takes and its parts, its processor time (that of its thread, which a busy machine
changes little), and the longest time for which the interpreter's lock is held. *bound* is the call and the processor
time over the time of 50 steps: the cost of saving in the background if all cores are busy.
"""

import dataclasses
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs from any directory

import numpy as np
import torch

from benchmarks.common import format_table, turns, write_json
from minillm.checkpoints import checkpoint, saving
from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse, require, script
from minillm.config import ModelConfig
from minillm.data import StepBatches
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.tokenizer import train_bpe
from minillm.training.optim import adamw
from minillm.training.run import Run

INTERVAL = 50  # steps between checkpoints, for which the overhead is stated
MODES = ("none", "async", "sync")
# preset: row length, rows per step, steps per block
SHAPES = {"demo": (256, 8, 20), "small": (512, 8, 5)}
PARTS = {  # of the writing: where each is looked up when it is called
    "weights": ("minillm.checkpoints.outputs.save_model",),
    "state": ("torch.save",),
    "hashes": ("minillm.checkpoints.checkpoint.sha256",),
    "fsync": ("os.fsync",),
    "removing": ("shutil.rmtree",),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What is measured."""

    shapes: str = "demo,small"
    """Comma list of: demo, small."""
    rounds: int = 5
    """Rounds; each has one block of every kind."""
    steps: int = 0
    """Steps per block (0: 20 for demo, 5 for small); the writing should take less time."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    num_threads: int = 2
    """CPU threads."""
    save_dir: str = ""
    """Where the checkpoints go (default: a temporary directory)."""
    output: str = "out/benchmarks/checkpoint.json"
    """JSON file for the figures (empty: none)."""

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        for name in self.shapes.split(","):
            require(name in SHAPES, f"--shapes {name}: choose from {', '.join(SHAPES)}")
        for name, least in {"rounds": 1, "steps": 0, "num_threads": 1}.items():
            require(getattr(self, name) >= least, f"--{name} {getattr(self, name)}: must be at least {least}")


class RandomRows:
    """Rows of random tokens, one document each."""

    data_hash, summary, target_bytes, log_prob = "random", {}, 0, None

    def __init__(self, vocab_size: int, length: int, n_rows: int):
        self.fixed_len = length
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, (n_rows, length + 1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self.tokens[index]
        return {
            "input_ids": tokens[:-1], "targets": tokens[1:],
            "position_ids": np.arange(self.fixed_len), "document_ids": np.zeros(self.fixed_len, dtype=np.int64),
        }  # fmt: skip


class Watch:
    """Times the parts of the writing, in any thread, and measures how long the lock is held."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.n_bytes = 0

    def timed(self, name: str, original):
        """Return ``original`` with its time added up under ``name``."""

        def call(*arguments, **options):
            began, own = time.perf_counter(), time.thread_time()
            try:
                return original(*arguments, **options)
            finally:
                self.seconds[name].append(time.perf_counter() - began)
                self.seconds[f"CPU of {name}"].append(time.thread_time() - own)

        return call

    def longest_pause(self, of: threading.Thread) -> float:
        """Return how long this thread had to wait for the interpreter at most, while thread ``of`` lived."""
        longest, last = 0.0, time.perf_counter()
        while of.is_alive():
            time.sleep(0.0005)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        return longest


class Bench:
    """One run whose blocks take turns."""

    def __init__(self, shape: str, args: Arguments, directory: Path):
        preset, (length, n_rows, n_steps) = ModelConfig.preset(shape), SHAPES[shape]
        self.shape, self.n_steps, self.watch = shape, args.steps or n_steps, Watch()
        self.args = PretrainArguments(
            data_path="", save_dir=str(directory), batch_size=n_rows, max_seq_len=length, max_steps=1_000_000,
            log_interval=1_000_000, save_interval=0, save_minutes=0, device="cpu",
            dtype=args.dtype, num_threads=args.num_threads,
        )  # fmt: skip
        self.run = Run(self.args, stage="pretrain")
        self.run.__enter__()
        torch.manual_seed(0)
        model = Transformer(preset)
        self.loader = StepBatches(RandomRows(preset.vocab_size, length, 64 * n_rows), **self.run.batching())
        module = self.run.wrap(model)
        tokenizer = train_bpe(iter(["some text"] * 9), vocab_size=270)
        self.model = self.run.start(
            adamw(module, learning_rate=1e-4), self.loader, tokenizer=tokenizer, loss=causal_lm_loss
        )
        self.steps = self.run.steps(self.loader)
        self.savers = {"async": self.run.saver}
        run, directory = self.run, self.run.run_directory.checkpoints
        self.savers["sync"] = saving.Saver(run.model, run.engine, run.output, directory, is_async=False)  # no copy
        self.n_parameters = preset.num_parameters()

    def step(self) -> float:
        """Make one update; return its time."""
        began = time.perf_counter()
        step = next(self.steps)
        for batch in step:
            with self.run.autocast():
                loss_sum, n_targets = causal_lm_loss(self.model, batch)
            step.backward(loss_sum, n_targets)
        self.run.update(step)
        return time.perf_counter() - began

    def block(self, mode: str) -> dict[str, float]:
        """Make a block of steps; return its time, that of the call that saves, and of the writing."""
        saver = self.savers.get(mode)
        if saver is not None:
            self.run.saver = saver
        before, figures = {name: sum(values) for name, values in self.watch.seconds.items()}, {"blocked": 0.0}
        steps, began = [], time.perf_counter()
        for number in range(self.n_steps):
            steps.append(self.step())
            if number == 0 and saver is not None:
                faults, saves = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
                self.run.save()
                figures["blocked"] = time.perf_counter() - saves
                figures["page faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        if saver is not None:
            waits = time.perf_counter()
            saver.wait()
            figures["waited at the end"] = time.perf_counter() - waits
        figures |= {"seconds": time.perf_counter() - began, "step": median(steps)}
        return figures | {name: sum(v) - before.get(name, 0.0) for name, v in self.watch.seconds.items()}

    def save_alone(self) -> dict[str, float]:
        """Save while another thread takes the interpreter's lock from time to time; return its longest pause."""
        self.run.saver = self.savers["async"]
        self.step()
        self.run.save()
        writing = threading.Thread(target=self.run.saver.wait)
        writing.start()
        pause = self.watch.longest_pause(writing)
        writing.join()
        newest = checkpoint.list_checkpoints(self.run.directory / "checkpoints")[0]
        return {"pause": pause, "bytes": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())}

    def close(self) -> None:
        """End the run."""
        for saver in self.savers.values():
            saver.close()
        self.run.__exit__(None, None, None)


def measure(shape: str, args: Arguments, directory: Path) -> dict:
    """Return the figures of one shape."""
    with ExitStack() as stack:
        bench = Bench(shape, args, directory)
        stack.callback(bench.close)
        for name, (target,) in PARTS.items():
            module, _, attribute = target.rpartition(".")
            original = getattr(sys.modules[module], attribute)
            stack.enter_context(patch(target, bench.watch.timed(name, original)))
        write = bench.watch.timed("writing", checkpoint.save_checkpoint)
        stack.enter_context(patch.object(checkpoint, "save_checkpoint", write))
        alone = bench.save_alone()  # a first one, which maps the memory
        for saver in ("sync", "async"):
            bench.block(saver)
        blocks: dict[str, list[dict]] = {mode: [] for mode in MODES}
        for number in range(args.rounds):
            for mode in turns(list(MODES), number):
                blocks[mode].append(bench.block(mode))
        alone = alone | {"pause": bench.save_alone()["pause"]}
    step = median(block["seconds"] for block in blocks["none"]) / bench.n_steps
    result = {"shape": shape, "parameters": bench.n_parameters, "steps": bench.n_steps, "step": step} | alone
    for mode in MODES[1:]:
        costs = [one["seconds"] - none["seconds"] for one, none in zip(blocks[mode], blocks["none"], strict=True)]
        names = ("blocked", "waited at the end", "page faults", "writing", "CPU of writing", *PARTS)
        parts = {name: median(block.get(name, 0.0) for block in blocks[mode]) for name in names}
        result[mode] = {"cost": median(costs), "costs": costs, "overhead": median(costs) / (INTERVAL * step), **parts}
        waits = parts["blocked"] + (parts["CPU of writing"] if mode == "async" else 0.0)
        result[mode]["bound"] = waits / (INTERVAL * step)
    result["blocks"] = blocks
    return result


def table(results: list[dict]) -> str:
    """Return the figures as text."""
    header = ["shape", "saves", "step s", "MiB", "costs s", f"at {INTERVAL}", "bound", "call s", "faults"]
    rows = [[*header, "writing s", "CPU s", *(f"{name} s" for name in PARTS), "lock held s"]]
    for result in results:
        for mode in MODES[1:]:
            one = result[mode]
            rows.append([
                result["shape"], mode, f"{result['step']:.3f}", f"{result['bytes'] / 2**20:.1f}", f"{one['cost']:.3f}",
                f"{one['overhead']:+.1%}", f"{one['bound']:.2%}", f"{one['blocked']:.3f}", f"{one['page faults']:,.0f}",
                f"{one['writing']:.2f}", f"{one['CPU of writing']:.2f}", *(f"{one[name]:.2f}" for name in PARTS),
                f"{result['pause']:.3f}" if mode == "async" else "",
            ])  # fmt: skip
    return format_table(rows)


@script
def main(argv: list[str] | None = None) -> list[dict]:
    """Measure, print the table, write the JSON; return the figures."""
    args = parse(Arguments, argv)
    torch.set_num_threads(args.num_threads)
    results = []
    for shape in args.shapes.split(","):
        directory = Path(tempfile.mkdtemp(prefix="checkpoint_", dir=args.save_dir or None))
        try:
            results.append(measure(shape, args, directory))
        finally:
            shutil.rmtree(directory)
    print(table(results))
    write_json(args.output, {"arguments": dataclasses.asdict(args), "results": results})
    return results


if __name__ == "__main__":
    main()
