"""The plan as text: every section, aligned, with its assumptions."""

import pytest

from minillm.cli.command_line import parse
from minillm.plan.arguments import PlanArguments
from minillm.plan.report import make_plan
from minillm.plan.text import format_plan, format_table


@pytest.fixture(scope="module")
def text():
    flags = ["--preset", "moe", "--gradient_checkpointing", "--mfu", "0.4", "--ranks", "4", "--batch_size", "1900"]
    return format_plan(make_plan(parse(PlanArguments, [*flags, "--gpus", "T4,H100"])))


def test_sections_and_assumptions_are_there(text):
    for head in ("MODEL", "FLOPS PER TOKEN", "MEMORY OF ONE PROCESS", "ENGINES with 4 ranks", "GPUS", "ADVICE"):
        assert f"\n{head}" in f"\n{text}"
    for said in ("active per token", "Hoffmann et al., 2022", "MFU 40%", "--async_save", "blocks run twice", "ZeRO 3"):
        assert said in text
    assert "(" in next(line for line in text.splitlines() if line.startswith("  H100"))  # so many rows do not fit


def test_lines_fit_a_wide_terminal(text):
    assert max(map(len, text.splitlines())) <= 130


def test_tables_are_aligned():
    lines = format_table([["", "one", "two"], ["a name", "1", "22"], ["b", "333333", "4"]]).splitlines()
    assert lines == ["             one  two", "  a name       1   22", "  b       333333    4"]
