"""Runs with a monitor of the adapter on every engine; started by ``test_monitors.py`` under torchrun.

-m tests.contracts.monitors OUT zero2 zero2-dora fsdp-balanced zero2-unseen

    zero2           LoRA; a look every second step
    zero2-dora      DoRA
    fsdp-balanced   with balanced gradients
    zero2-resumed   the same as zero2, stopped by a signal and resumed
    zero2-unseen    the same as zero2, without a monitor
    zero2-local     a bug: the norm of this rank's part of a gradient instead of the whole one's
"""

import argparse
import contextlib
import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

import torch

from minillm.checkpoints.interrupt import Interrupted
from minillm.distributed.engines import engine_class
from minillm.lora.more import monitor
from minillm.lora.more.balance import balance_gradients
from minillm.reports.tracking import read_metrics
from minillm.reports.watch import Watch
from tests.contracts.engines import flags_of, spare_the_build
from tests.contracts.harness import LORA, arguments, train

INTERVAL, N_STEPS, CLIP = 2, 5, 0.2
TOKENIZER = SimpleNamespace(special_ids=(), eos_token_id=0, token_bytes=lambda i: b"%d" % i, decode=str)
PLAIN = {"rank": 3, "alpha": 5, "init": "gaussian"}  # odd sizes: no two ranks hold equal parts


class LocalGradients:
    """Mixed into an engine: it returns what this rank holds of a gradient, with zeros where others hold theirs."""

    def gradient(self, parameter):
        whole = super().gradient(parameter)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        flat = torch.zeros_like(whole).flatten()
        part = slice(rank * flat.numel() // world_size, (rank + 1) * flat.numel() // world_size)
        flat[part] = whole.flatten()[part]
        return flat.view_as(whole)


def run_one(name: str, directory: Path) -> dict:
    """Train on the engine that ``name`` begins with; return the looks, the weights and the number of gathers."""
    engine, _, kind = name.partition("-")
    n_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    n_gathers, n_looks = [], []
    monitor.N_DIGITS = 12  # a rounded figure can differ by 1e-5 alone

    def watch(run, model, loader) -> Watch | None:
        if kind == "unseen":
            return None
        if not run.engine.has_whole_gradients:
            gradient = run.engine.gradient
            run.engine.gradient = lambda parameter: (n_gathers.append(run.step), gradient(parameter))[1]
        return Watch(
            model, run.directory, TOKENIZER, loader.rows, interval=INTERVAL, engine=run.engine, report=n_looks.append
        )

    def before_update(run) -> None:
        if kind == "balanced":
            balance_gradients(run.model, run.engine)
        if kind == "resumed" and run.step == 2 and not run.args.from_resume:
            signal.raise_signal(signal.SIGTERM)

    args = arguments(
        directory,
        batch_size=4 // n_ranks,
        global_batch_size=12,
        max_steps=N_STEPS,
        eval_interval=2,
        grad_clip=CLIP,
        **flags_of(engine),
    )
    base = engine_class(args.parallel)
    options = {
        "engine": type("Local", (LocalGradients, base), {}) if kind == "local" else base,
        "lora": LORA if kind == "dora" else PLAIN,
        "watch": watch,
        "validate": True,
        "before_update": before_update,
    }
    if kind == "resumed":
        with contextlib.suppress(Interrupted):
            train(args, **options)
        args = dataclasses.replace(args, from_resume=True)
    result = train(args, **options)
    (path,) = directory.rglob("metrics.jsonl")
    rows = read_metrics(path.with_name("monitor.jsonl"))
    return {"rows": rows, "metrics": result["metrics"], "weights": result["weights"], "gathers": n_gathers}


def main() -> None:
    spare_the_build()
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="+")
    said = parser.parse_args()
    torch.distributed.init_process_group("gloo")  # one group for all: every Run finds it and leaves it alone
    for name in said.names:
        result = run_one(name, said.out / name)
        if torch.distributed.get_rank() == 0:
            torch.save(result, said.out / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
