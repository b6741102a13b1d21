"""Chapter 1: the first three commands of ``make demo`` with tiny settings, in a folder that is deleted afterwards."""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

from minillm.reports.tracking import read_metrics
from minillm.tokenizer import load_tokenizer


def run(*words: object) -> None:
    """Run a script of the library; show what it prints only if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


with tempfile.TemporaryDirectory() as folder:
    data, out = Path(folder) / "data", Path(folder) / "out"

    # 1. The demo's world: texts that a program makes, so that their probability is known.
    run("dataset/make_demo.py", "--out_dir", data, "--n_pretrain", 8000, "--n_valid", 200)
    texts, valid = data / "pretrain_train.jsonl", data / "pretrain_valid.jsonl"
    with texts.open(encoding="utf-8") as file:
        print(f"first text: {file.readline().strip()}")

    # 2. A tokenizer that is learned from these texts.
    run("train_tokenizer.py", "--data_path", texts, "--valid_path", valid, "--vocab_size", 512, "--save_dir", out)
    vocab_size = load_tokenizer(out / "tokenizer").vocab_size
    print(f"tokens in the vocabulary: {vocab_size}")

    # 3. Sixty steps of pretraining, with a line in metrics.jsonl after each.
    settings = "--preset demo --max_seq_len 128 --packing best_fit --batch_size 8 --learning_rate 3e-3 --max_steps 60"
    run("train_pretrain.py", *settings.split(), "--data_path", texts, "--valid_path", valid,
        "--eval_interval", 60, "--log_interval", 1, "--save_dir", out)  # fmt: skip
    lines = read_metrics(next(out.glob("pretrain_*")) / "metrics.jsonl")

train = [line for line in lines if line["split"] == "train"]
last = [line for line in lines if line["split"] == "valid"][-1]
print(f"ln V: {math.log(vocab_size):.4f}")
print(f"loss at step 1: {train[0]['loss']:.4f}")
print(f"tokens of a step: {train[0]['tokens']}")
print(f"steps: {train[-1]['step']}")
print(f"tokens of all steps: {train[-1]['tokens']}")
print(f"validation loss after 60 steps: {last['loss']:.4f}")
print(f"entropy of these texts: {last['floor']:.4f}")
