"""Chapter 30: one rank and two: with the same flags another run, with the same rows per step the same run."""

import os
import subprocess
import sys
from pathlib import Path

from ch30_run import FLAGS, PLAIN, ROOT, SHAPE, world

from minillm.reports.tracking import read_metrics

RUN = "--max_steps 10 --log_interval 1"


def losses(name: str, n_ranks: int, flags: str) -> list[float]:
    """Return the training loss of each step of a run on ``n_ranks``."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(n_ranks)] if n_ranks > 1 else []
    words = f"{SHAPE} {PLAIN} {FLAGS['pretrain']} {RUN} --run_name {name} {flags}".split()
    command = [sys.executable, *launcher, str(ROOT / "train_pretrain.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [row["loss"] for row in read_metrics(Path("out", name, "metrics.jsonl")) if row["split"] == "train"]


with world():
    one = losses("one", 1, "--batch_size 4")
    for name, flags in (("same_flags", "--batch_size 4"), ("same_rows", "--batch_size 2 --global_batch_size 4")):
        two = losses(name, 2, flags)
        difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
        print(f"two ranks with {flags}, losses differ by up to {difference:.6f}")
