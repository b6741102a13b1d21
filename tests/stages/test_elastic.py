"""Two nodes, here two agents on one machine, and torchrun's restart after a killed worker: the same run, exactly."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm.checkpoints.checkpoint import list_checkpoints
from minillm.reports.tracking import CLOCK, read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def agent(world, flags, python):
    """Call it with torchrun's flags and a run's directory: torchrun, started, in a session of its own."""
    started = []

    def agent(*launcher: str, out: Path, interpreter: str = python) -> subprocess.Popen:
        program = [
            str(ROOT / "train_pretrain.py"), *flags(world), "--save_dir", str(out), "--tokenizer_path",
            str(world.out / "tokenizer"), "--data_path", str(world.text), "--max_seq_len", "48", "--batch_size", "2",
            "--global_batch_size", "8", "--max_steps", "60", "--save_interval", "5", "--log_interval", "1",
        ]  # fmt: skip
        process = subprocess.Popen(
            [interpreter, "-m", "torch.distributed.run", *launcher, "--no-python", python, *program],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield agent
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def result(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    directory = out / "pretrain_32"
    rows = read_metrics(directory / "metrics.jsonl")
    rows = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    return rows, load_file(directory / "model.safetensors")


def workers_of(process: subprocess.Popen) -> list[int]:
    psutil = pytest.importorskip("psutil")
    found = psutil.Process(process.pid).children()
    return [child.pid for child in found if any("train_pretrain" in word for word in child.cmdline())]


def test_a_killed_worker_is_started_anew_and_nothing_changes(agent, world):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_id", "job", "--rdzv_backend", "c10d"]
    nodes += ["--rdzv_endpoint", f"localhost:{port}"]
    two_nodes = [agent(*nodes, out=world.folder / "nodes") for _ in range(2)]
    for process in two_nodes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-3000:]

    out = world.folder / "killed"
    standalone = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    process = agent(*standalone, out=out, interpreter=sys.executable)  # its workers are its children
    end = time.monotonic() + 100
    while not list_checkpoints(out / "pretrain_32" / "checkpoints") and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-3000:]
    assert output.count("resumed from") == 1
    assert "lost the others" in output

    (rows, weights), (wanted_rows, wanted) = result(out), result(world.folder / "nodes")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows == wanted_rows
    assert all(torch.equal(weights[name], weight) for name, weight in wanted.items())
