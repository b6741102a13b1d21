"""The memory benchmark measures what it says: chunks hold less than whole logits."""

import math

from benchmarks import loss_memory


def test_chunks_hold_less_than_whole_logits(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(loss_memory.SHAPES, "demo", (32, 1, 64, 2, 64))
    argv = ["--shapes", "demo", "--dtypes", "float32", "--rounds", "1", "--vocab_size", "70000", "--device", "cpu"]
    output = tmp_path / "figures.json"
    result = loss_memory.main([*argv, "--output", str(output)])
    kd, dpo = result["cases"]
    assert kd["what"] == "chunked"
    assert kd["peaks"]["chunked"] < 0.9 * kd["peaks"]["whole"]
    assert 0.5 < dpo["memory"] < 3
    assert all(math.isfinite(case["time"]) and case["time"] > 0 for case in result["cases"])
    assert output.is_file()
    assert "chunked" in capsys.readouterr().out
