"""The demo's table: figures from files, before and after."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

from demo_table import Line, lines_of, main, table


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def rows(*losses):
    lines = ({"step": n, "split": "valid", "loss": x, "floor": 0.8} for n, x in enumerate(losses))
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_figures_come_from_where_they_were_written(tmp_path, capsys):
    write(tmp_path / "pretrain_128" / "metrics.jsonl", rows(3.0, 0.9))
    write(tmp_path / "pretrain_128" / "config.json", {"vocab_size": 1024})
    write(tmp_path / "pretrain_64" / "metrics.jsonl", rows(1.5))
    write(tmp_path / "distill_64" / "metrics.jsonl", rows(1.4))
    write(tmp_path / "results" / "full_sft.json",
          {"exact_match": {"task_average": 0.96}, "preference": {"accuracy": 0.5, "like_chosen": 0.6}})  # fmt: skip
    write(tmp_path / "results" / "rlhf.json",
          {"exact_match": {"task_average": 0.95}, "preference": {"accuracy": 1.0, "like_chosen": 0.97}})  # fmt: skip
    write(tmp_path / "results" / "reason.json", {"reasoning": {"thinking": {"accuracy": 0.9, "format_adherence": 1.0}}})
    write(tmp_path / "results" / "full_sft_tools_test.json",
          {"tool_calls": {"task_average": 0.2}, "exact_match": {"task_average": 0.1}})  # fmt: skip
    write(tmp_path / "results" / "tools_tools_test.json",
          {"tool_calls": {"task_average": 0.8}, "exact_match": {"task_average": 0.7}})  # fmt: skip
    lines = list(lines_of(tmp_path))
    found = {(line.stage, line.metric.split(",")[0].split(" (")[0]): (line.before, line.after) for line in lines}
    assert found["pretrain", "nats/token above the floor"] == pytest.approx((math.log(1024) - 0.8, 0.1))
    assert found["full_sft", "tasks"] == (None, 0.96)
    assert found["dpo", "chosen reply more probable"] == (0.5, 1.0)
    assert found["dpo", "free answers like the chosen reply"] == (0.6, 0.97)
    assert found["dpo", "tasks"] == (0.96, 0.95)
    assert found["distill", "student"] == pytest.approx((0.7, 0.6))
    assert found["reason", "problems"] == (None, 0.9)
    assert (found["tools", "calls"], found["tools", "answers after calls"]) == ((0.2, 0.8), (0.1, 0.7))
    assert ("tools", "tasks") not in found
    assert not [stage for stage, _ in found if stage == "lora"]  # nothing of it is there
    main(["--save_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "50.0%  100.0%" in shown
    assert "0.700" in shown


def test_columns_stand_under_each_other():
    lines = [Line(stage="a", metric="bb", before=None, after=0.5), Line(stage="cc", metric="d", before=1, after=0)]
    assert table(lines).splitlines() == [
        "stage  metric  before  after",
        "a      bb           -  50.0%",
        "cc     d       100.0%   0.0%",
    ]


def test_an_empty_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--save_dir", str(tmp_path)])
    assert ended.value.code == 2
    assert "make demo writes them" in capsys.readouterr().err
