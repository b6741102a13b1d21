"""A short torture: runs of all stages are killed and resumed, and a broken resume does not get through.

The parent of the forked runs must have no threads, which a process that runs tests may have: so it is one of its own.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CALL = """
import sys
from benchmarks import torture
torture.MAX_DIFFERENCES = 1
{bug}
sys.exit(torture.main(sys.argv[1:]))
"""
FORGETS_RANDOMNESS = """
from minillm.checkpoints import checkpoint
checkpoint.set_rng_state = lambda state: None
"""
# The last name comes before the training state is written: whoever is killed in between leaves half a checkpoint.
NAMED_TOO_EARLY = """
import os, torch
from minillm.checkpoints import checkpoint
def save_checkpoint(directory, step, write_model, state, *, keep_last, **_):
    final = directory / f"step-{step:08d}"
    final.mkdir(parents=True, exist_ok=True)
    write_model(final)
    torch.save(state, final / checkpoint.STATE_FILE)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": checkpoint.sha256(f)} for f in final.iterdir()}
    (final / checkpoint.MANIFEST_FILE).write_text(checkpoint.json.dumps({"files": files}))
    checkpoint.tidy(directory, step=step, keep_last=keep_last)
checkpoint.save_checkpoint = save_checkpoint
"""


@pytest.fixture
def torture(python):
    """Call it with a directory, flags and the code of a bug: the process of a torture that ran to its end."""

    def torture(directory: Path, *flags: str, bug: str = "") -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        places = ["--save_dir", str(directory), "--output", str(directory / "torture.md")]
        places += ["--json", str(directory / "torture.json")]
        code = [python, "-c", CALL.format(bug=bug), *places, *flags]
        return subprocess.run(code, env=environment, capture_output=True, text=True, timeout=280)

    return torture


def test_killed_and_resumed_equals_uninterrupted(tmp_path, torture):
    """Of every stage: test_resume.py, and ``python benchmarks/torture.py``."""
    stages = "pretraining, experts;DPO, reference on disk;distillation, teacher on disk"
    ended = torture(tmp_path, "--kills", "3", "--kills_per_run", "1", "--seed", "3", "--variants", stages)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads((tmp_path / "torture.json").read_text())
    assert report["differences"] == []
    counts = report["counts"]
    assert sum(counts[name].get(kind, 0) for name in counts for kind in ("time", "call", "signal")) >= 3
    assert all(counts[name]["written"] for name in counts)
    assert not list(tmp_path.rglob("*.safetensors")), "what does not differ is not kept"
    assert "nothing differs" in (tmp_path / "torture.md").read_text()


@pytest.mark.parametrize(
    "bug, variant, said",
    [
        (FORGETS_RANDOMNESS, "LoRA", "other numbers|instead of"),
        (NAMED_TOO_EARLY, "fine-tuning", "is not whole, and nobody has damaged it"),
    ],
)
def test_a_broken_resume_is_caught(bug, variant, said, tmp_path, torture):
    ended = torture(tmp_path, "--kills", "12", "--variants", variant, bug=bug)
    assert ended.returncode == 1, ended.stderr[-3000:]
    (first, *_) = json.loads((tmp_path / "torture.json").read_text())["differences"]
    assert any(words in first for words in said.split("|")), first
    assert "differ; the first" in (tmp_path / "torture.md").read_text()
    assert list(tmp_path.rglob("*.safetensors")), "the run that differs is kept"
