"""Chapter 16: a run of the demo that is resumed from its middle ends with the same bytes as one that never stopped."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMMAND = [
    *(sys.executable, "train_pretrain.py", "--tokenizer_path", "out/demo/tokenizer"),
    *("--preset", "demo", "--max_seq_len", "64", "--batch_size", "2"),
    *("--max_steps", "12", "--save_interval", "6", "--keep_last", "2"),
]


def train(folder: str, *flags: str) -> Path:
    """Run the command into ``folder``; return the run's directory."""
    command = [*COMMAND, "--data_path", f"{folder}/texts.jsonl", "--save_dir", f"{folder}/out", *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if "resumed from" in line:
            print(line[: line.index("resumed")] + "resumed" + line[line.rindex(" (step") :])
    return next(Path(folder, "out").glob("pretrain*"))


def digest(run: Path) -> str:
    """Return the hash of the model's file."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()[:16]


with tempfile.TemporaryDirectory() as folder:
    with open("dataset/demo/pretrain_train.jsonl", encoding="utf-8") as texts:
        Path(folder, "texts.jsonl").write_text("".join(next(texts) for _ in range(200)), encoding="utf-8")
    run = train(folder)
    uninterrupted = digest(run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "model.safetensors").unlink()
    resumed = digest(train(folder, "--from_resume"))
    print("the same bytes" if resumed == uninterrupted else "other bytes")
