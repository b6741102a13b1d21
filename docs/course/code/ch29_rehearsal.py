"""Chapter 29: the rehearsal of a run: dry run, a hundred steps, a stop, the whole run predicted, and then made."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minillm.config import ModelConfig
from minillm.plan.flops import count_flops, hours
from minillm.plan.parameters import meta_model
from minillm.reports.tracking import read_metrics

SETTINGS = "--preset demo --max_seq_len 128 --packing best_fit --batch_size 8 --learning_rate 3e-3 --log_interval 10"


def run(*words: object) -> str:
    """Run a script of the library and return what it prints; show that if it fails."""
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def train_rows(path: Path) -> list[dict]:
    """Return the rows of training in a metrics.jsonl."""
    return [row for row in read_metrics(path) if row["split"] == "train"]


with tempfile.TemporaryDirectory() as folder:
    data, out = Path(folder) / "data", Path(folder) / "out"
    run("dataset/make_demo.py", "--out_dir", data, "--n_pretrain", 8000, "--n_valid", 200)
    texts, valid = data / "pretrain_train.jsonl", data / "pretrain_valid.jsonl"
    run("train_tokenizer.py", "--data_path", texts, "--valid_path", valid, "--vocab_size", 512, "--save_dir", out)
    command = ["train_pretrain.py", *SETTINGS.split(), "--data_path", texts, "--valid_path", valid, "--save_dir", out]

    # 1. The dry run: nothing is trained, and nothing is written but the tokenised data.
    dry = run(*command, "--dry_run")
    print("\n".join(line for line in dry.splitlines() if line.startswith(("parameters", "steps", "memory", "time"))))
    n_steps = int(re.search(r"([\d,]+) in all", dry)[1].replace(",", ""))
    dry_seconds = n_steps * float(re.search(r"about ([\d.]+) s per step", dry)[1])

    # 2. The run, stopped by Ctrl-C when it has made a hundred steps.
    metrics = out / "pretrain_128" / "metrics.jsonl"
    with (Path(folder) / "log.txt").open("w+") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=log, stderr=log)
        while process.poll() is None and not [row for row in train_rows(metrics) if row["step"] >= 100]:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait()
        log.seek(0)
        stopped_at = re.search(r"saved after step (\d+)", log.read())
    if stopped_at is None:
        sys.exit((Path(folder) / "log.txt").read_text())
    print(f"exit code: {code}, saved after step {stopped_at[1]}")

    # 3. The whole run, predicted from steps 21 to 100: the first twenty are slower.
    rows = {row["step"]: row for row in train_rows(metrics)}
    n_tokens, seconds = (rows[100][name] - rows[20][name] for name in ("tokens", "seconds"))
    tokens_per_s = n_tokens / seconds
    whole_tokens = rows[100]["tokens"] / 100 * n_steps
    flops = count_flops(meta_model(ModelConfig.preset("demo", vocab_size=512)), 128)
    mfu = sum(row["mfu"] for step, row in rows.items() if 20 < step <= 100) / 8
    peak = sum(row["tokens_per_s"] * flops.training / row["mfu"] for step, row in rows.items() if 20 < step <= 100) / 8
    predicted = 3600 * hours(flops, whole_tokens, peak=peak, mfu=mfu)
    print(f"tokens per second: {tokens_per_s:,.0f}, with {flops.training:,.0f} FLOPs each")
    print(f"MFU: {mfu:.2f} of the {peak / 1e9:.0f} GFLOP/s that this machine reached in a plain product")
    print(f"tokens predicted: {whole_tokens:,.0f}")

    # 4. The rest, to see whether that was right.
    run(*command, "--from_resume")
    rows = train_rows(metrics)
    is_without_gap = [row["step"] for row in rows] == [*range(10, n_steps, 10), n_steps]
    print(f"rows of metrics without gap and repetition: {'yes' if is_without_gap else 'no'}")
    print(f"tokens predicted / seen: {whole_tokens / rows[-1]['tokens']:.4f}")
    print(f"seconds: dry run {dry_seconds:.1f}, planner {predicted:.1f}, measured {rows[-1]['seconds']:.1f}")
    small = count_flops(meta_model(ModelConfig.preset("small")), 512)
    print(f"the 26M plan at this many FLOPs per second: {hours(small, 516_597_760, peak=peak, mfu=mfu):,.0f} hours")
