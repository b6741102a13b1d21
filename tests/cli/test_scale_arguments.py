"""The flags that spread a run and keep it: their limits, and that --help explains each."""

import dataclasses

import pytest

from minillm.cli.arguments import PretrainArguments
from minillm.cli.command_line import parse
from minillm.cli.model_arguments import ModelArguments
from minillm.cli.train_arguments import ScaleArguments
from minillm.errors import UserError

OWN = {field.name for field in dataclasses.fields(ScaleArguments)} - {
    field.name for field in dataclasses.fields(ModelArguments)
}


@pytest.fixture
def parsed(tmp_path):
    """Parse flags of a pretraining whose data file is there."""
    (tmp_path / "a.jsonl").write_text("{}")
    return lambda *argv: parse(PretrainArguments, ["--data_path", str(tmp_path / "a.jsonl"), *argv])


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("save_interval", "-1", "0"),
        ("save_minutes", "-0.5", "0"),
        ("keep_last", "0", "1"),
        ("timeout_minutes", "0", "0.01"),
        ("timeout_minutes", "-1", "30"),
    ],
)
def test_limits(parsed, name, wrong, right):
    with pytest.raises(UserError) as error:
        parsed(f"--{name}", wrong)
    assert f"--{name} {float(wrong) if '.' in wrong or 'minutes' in name else wrong}: must be " in str(error.value)
    assert float(getattr(parsed(f"--{name}", right), name)) == float(right)


def test_limits_below_hold_too(parsed):
    """This class stands between others: its check must call theirs."""
    with pytest.raises(UserError, match="--learning_rate"):
        parsed("--learning_rate", "-1")
    with pytest.raises(UserError, match="--use_moe"):
        parsed("--num_experts", "4")


def test_defaults_keep_a_run_without_a_flag(parsed):
    args = parsed()
    assert (args.parallel, args.async_save, args.keep_last, args.save_interval) == ("ddp", True, 2, 0)
    assert (args.from_resume, args.auto_resume, args.save_minutes) == (False, False, 10)


def test_what_parallel_takes(parsed, capsys):
    for name in ("ddp", "fsdp", "deepspeed"):
        assert parsed("--parallel", name).parallel == name
    with pytest.raises(SystemExit) as ended:
        parsed("--parallel", "tensor")
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert all(name in shown for name in ("ddp", "fsdp", "deepspeed"))


def test_help_explains_each(parsed, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed("--help")
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert {"parallel", "deepspeed_config", "auto_resume", "async_save", "save_minutes", "timeout_minutes"} <= OWN
    for name in OWN:
        _, flag, after = shown.partition(f"--{name} ")
        assert flag, f"--{name} is not in the help"
        explained = after.partition(" --")[0]
        assert len(explained.split()) > 3, f"--{name}: {explained}"
