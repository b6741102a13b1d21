"""The flags of train_reason.py: their defaults, and each range check."""

import pytest

from minillm.cli.arguments import ReasonArguments
from minillm.cli.command_line import parse
from minillm.errors import UserError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n')
    return str(path)


def test_the_defaults_that_others_rely_on(file):
    args = parse(ReasonArguments, ["--data_path", file])
    assert (args.from_weight, args.tag_weight, args.epochs, args.max_seq_len) == ("rlhf", 10.0, 1, 1024)
    assert (args.replay_files, args.replay_ratio, args.learning_rate) == ([], 0.25, 1e-5)


def test_flags_are_read(file):
    argv = ["--data_path", file, "--tag_weight", "2.5", "--replay_path", f"{file}, {file}", "--replay_ratio", "0.5"]
    args = parse(ReasonArguments, argv)
    assert (args.tag_weight, args.replay_files, args.replay_ratio) == (2.5, [file, file], 0.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tag_weight", 0.0, "--tag_weight 0.0: must be positive"),
        ("tag_weight", -1.0, "--tag_weight -1.0: must be positive"),
        ("tag_weight", float("nan"), "--tag_weight nan: must be positive"),
        ("tag_weight", float("inf"), "--tag_weight inf: must be positive and finite"),
        ("replay_ratio", 0.0, "--replay_ratio 0.0: must lie between 0 and 1"),
        ("replay_ratio", 1.0, "--replay_ratio 1.0: must lie between 0 and 1"),
        ("replay_path", "nowhere.jsonl", "--replay_path nowhere.jsonl: no such file"),
        ("from_weight", "", "--from_weight is empty"),
        ("learning_rate", 0.0, "--learning_rate 0.0: must be positive"),
    ],
)
def test_a_value_out_of_range_is_named(file, name, value, message):
    with pytest.raises(UserError) as raised:
        ReasonArguments(data_path=file, **{name: value}).check()
    assert message in str(raised.value)
