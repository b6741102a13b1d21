"""Shared by the LoRA studies: one run of train_lora.py with its figures."""

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

import train_lora
from benchmarks.common import call_script
from minillm.cli.command_line import require
from minillm.data import read_records
from minillm.errors import UserError
from minillm.evaluation import exact_match
from minillm.hub.huggingface import load_model
from minillm.lora import load_lora, merge_lora
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class TrialArguments:
    """What every adapter of a study has in common: the model, the data, the shape, the seeds."""

    base: str = "out/demo/full_sft_128"
    """The model directory to adapt. The default exists after `make demo`."""
    data_path: str = "dataset/demo/identity_train.jsonl"
    """Conversations to train on."""
    valid_path: str = "dataset/demo/identity_test.jsonl"
    """Held-out conversations: for the loss, and to be answered."""
    steps: int = 1000
    """Optimizer updates of each run."""
    seeds: str = "1,2,3"
    """Seeds of initialisation and order, with commas; the first one also chooses the rate."""
    lora_rank: int = 16
    """Rank of all adapters."""
    lora_alpha: float = 32.0
    """Alpha of all adapters."""
    batch_size: int = 4
    """Rows per update."""
    max_seq_len: int = 128
    """Tokens per row."""
    max_new_tokens: int = 64
    """Longest answer."""
    n_answers: int = 100
    """Held-out questions that are answered."""
    num_threads: int = 0
    """CPU threads (0: torch's default)."""

    def check_files(self) -> None:
        """Raise UserError for a missing file, or no steps."""
        for name in ("base", "data_path", "valid_path"):
            path = getattr(self, name)
            require(Path(path).exists(), f"--{name} {path}: does not exist; run make demo first, or name your own")
        require(self.steps >= 1, f"--steps {self.steps}: must be at least 1")

    @property
    def seed_numbers(self) -> list[int]:
        """Return the seeds."""
        return [int(seed) for seed in self.seeds.split(",")]

    @property
    def flags(self) -> dict[str, object]:
        """Return the flags of train_lora.py that all adapters share."""
        names = ("data_path", "valid_path", "lora_rank", "lora_alpha", "batch_size", "max_seq_len", "num_threads")
        # The monitor looks at every tenth step, and at the first one.
        intervals = {"log_interval": 50, "monitor_interval": 10}
        return {name: getattr(self, name) for name in names} | {"max_steps": self.steps, **intervals}


def run_trial(base: str, flags: dict[str, object], *, tests: dict[str, str], evaluate=None) -> dict:
    """Train one adapter with ``flags`` of train_lora.py, in a temporary directory.

    Args:
        base: a model directory. tests: name → file of conversations, scored by exact match.
        evaluate: called with (model with the adapter merged, tokenizer); its dictionary is added to the result.

    Returns ``{"diverged": True}`` when the loss was no number, else the last validation loss (nats per token), the
    median gradient norm, seconds of training steps, exact match by test, and the rows of metrics.jsonl and
    monitor.jsonl.
    """
    with tempfile.TemporaryDirectory() as directory:
        given = {"from_weight": base, "save_dir": directory, "lora_name": "trial"}
        given |= {"save_interval": 0, "save_minutes": 0, **flags}
        began = time.perf_counter()
        try:
            call_script(train_lora.main, given)
        except UserError as error:
            if "finite" in str(error):
                return {"diverged": True}
            raise
        (saved,) = (Path(directory) / "lora").glob("trial_*")
        rows = read_metrics(saved / "metrics.jsonl")
        losses = {split: [row["loss"] for row in rows if row["split"] == split] for split in ("train", "valid")}
        norms = [row["grad_norm"] for row in rows if row["split"] == "train"]
        last = [row for row in rows if row["split"] == "train"][-1]
        model, tokenizer = load_model(base), load_tokenizer(base)
        load_lora(model, saved)
        merge_lora(model, keep_base=False).eval()
        result = {
            "diverged": not all(math.isfinite(loss) for loss in losses["valid"][-1:]),
            "loss": (losses["valid"] or losses["train"])[-1],
            "grad_norm": median(norms),
            "seconds": last["seconds"],
            "wall_seconds": time.perf_counter() - began,
            "rows": rows,
            "monitor": read_metrics(saved / "monitor.jsonl"),
        }
        with torch.inference_mode():
            for name, path in tests.items():
                answers = exact_match(model, tokenizer, list(read_records(path)), max_new_tokens=64, batch_size=64)
                result[name] = answers.accuracy
            return result | (evaluate(model, tokenizer) if evaluate else {})
