"""The whole demo, shortened: every command of ``make demo`` in order, without a terminal and without a network."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {
    "pretrain": 3000, "valid": 60, "addition": 60, "sorting": 60, "counting": 60, "translation": 60, "facts": 60,
    "multi_turn": 60, "style": 60, "writing": 60, "repeat": 60, "sft_valid": 40, "test": 4, "reason": 20,
    "reason_test": 10, "tools": 20, "tools_replay": 20, "tools_test": 4,
}  # fmt: skip


@pytest.mark.timeout(720)
def test_demo_runs_from_raw_text_to_chat(tmp_path, python):
    sizes = " ".join(f"--n_{name} {size}" for name, size in SIZES.items())
    evaluation = f"python eval_model.py --save_dir {tmp_path}/out --preset demo --max_new_tokens 8"
    training = "--max_steps 6 --batch_size 4 --eval_interval 3 --save_interval 3 --log_interval 2 --dtype float32"
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    settings = {"DEMO": f"{tmp_path}/out", "DATA": f"{tmp_path}/data", "DATA_FLAGS": sizes, "TRAIN_FLAGS": training}
    settings["EVAL"] = evaluation  # as in the Makefile, but with short answers
    done = subprocess.run(
        ["make", "demo-run", *(f"{name}={value}" for name, value in settings.items())],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no questions on standard input" in done.stdout
    for name in ("pretrain_128", "full_sft_128", "rlhf_128", "distill_64", "pretrain_64", "reason_128"):
        directory = tmp_path / "out" / name
        assert {"config.json", "model.safetensors", "tokenizer.json", "run.yaml", "summary.html", "summary.png"} <= {
            file.name for file in directory.iterdir()
        }
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["split"] == "train"] == [2, 4, 6]
        assert [row["step"] for row in rows if row["split"] == "valid"] == [3, 6]
    floor = [row for row in rows if "floor" in row]
    assert not floor  # only texts know their probability; conversations do not
    table = done.stdout[done.stdout.index("\nstage ") :].splitlines()[1:16]
    stages = [line.split()[0] for line in table]
    expected = ["stage", "pretrain", "full_sft", *2 * ["lora"], *3 * ["dpo"], "distill", *3 * ["reason"]]
    assert stages == [*expected, *3 * ["tools"]]
    assert sum(line.count("%") for line in table) == 23  # losses have none, and the form has no before
    assert f"\nreport: {tmp_path}/out/report.html\n" in done.stdout
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(f'id="{stage}"' in report for stage in stages[1:])
    assert report.count("shortened to 6 steps in") == 7 + 10  # in the table; with each run's curves
    assert not [
        words for words in ("missing", "not finished", "not measured", "No samples", "No dist") if words in report
    ]
    for name in ("identity", "identity_alone"):
        directory = tmp_path / "out" / "lora" / f"{name}_128"
        written = {path.name for path in directory.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "summary.html"} <= written
        assert f"out/full_sft_128 + {directory}: parameters" in done.stdout
    assert done.stdout.count("\nidentity ") == 3 * 8  # groups of the held-out questions: without, and with adapters
    command = [python, "docs/course/pictures.py", "--save_dir", str(tmp_path / "out")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=120)
    drawn = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert drawn == {f"{name}.{t}.svg" for name in ("loss", "attention", "lora", "dpo") for t in ("light", "dark")}
