"""The command, as a user runs it."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from minillm.plan.__main__ import main

ROOT = Path(__file__).parents[2]


def test_text_and_json_say_the_same(capsys):
    flags = ["--preset", "demo", "--batch_size", "2", "--max_seq_len", "256", "--gpus", "T4"]
    figures = main(flags)
    text = capsys.readouterr().out
    main([*flags, "--json"])
    read = json.loads(capsys.readouterr().out)
    assert read["memory"] == json.loads(json.dumps(figures["memory"]))
    assert f"{read['parameters']['total']:,}" in text
    assert f"{read['gpus']['T4']['hours']:,.1f}" in text


def test_an_adapter_and_a_mixture_of_experts(capsys):
    figures = main(["--use_moe", "--lora_rank", "8", "--base_dtype", "bfloat16", "--gpus", "T4"])
    assert figures["parameters"]["trained"] < 0.2 * figures["parameters"]["total"]
    assert "frozen weights get no gradient" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--batch_size", "0"], ["--gpus", "abacus"], ["--hidden_size", "7"]])
def test_bad_values_are_one_line_and_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1


def test_as_a_process_from_another_directory(tmp_path, python):
    done = subprocess.run(
        [python, "-m", "minillm.plan", "--preset", "small", "--gpus", "4090"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "4090" in done.stdout
    assert not list(tmp_path.iterdir())
