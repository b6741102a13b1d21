"""The benchmark of the planner runs, compares, and writes its JSON."""

import json
import sys

import pytest

from benchmarks import plan_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_estimate_and_measurement_stand_side_by_side(tmp_path, capsys):
    output = tmp_path / "deep" / "figures.json"
    result = plan_memory.main(["--cases", "wide_few_tokens", "--num_threads", "1", "--output", str(output)])
    (case,) = result["cases"]
    assert 0.9 < case["ratio"] < 1.1
    assert json.loads(output.read_text())["cases"][0]["name"] == "wide_few_tokens"
    assert "estimate / measured" in capsys.readouterr().out


def test_at_least_twelve_cases_of_every_kind():
    steps = [plan_memory.step_of(name) for name in plan_memory.CASES]
    assert len(steps) >= 12
    assert {step.dtype for step in steps} == {"float32", "bfloat16"}
    assert {step.gradient_checkpointing for step in steps} == {True, False}
    for property_of in (lambda s: s.config.num_experts, lambda s: s.lora_rank, lambda s: s.accumulation_steps - 1):
        assert any(map(property_of, steps))
        assert not all(map(property_of, steps))


@pytest.mark.parametrize("flags", [["--cases", "huge"], ["--updates", "1"]])
def test_bad_values_are_refused(flags):
    with pytest.raises(SystemExit):
        plan_memory.main(flags)
