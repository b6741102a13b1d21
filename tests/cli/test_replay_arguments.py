"""The flags of stages that mix in old conversations."""

import pytest

from minillm.cli.arguments import ReplayArguments
from minillm.errors import UserError


def test_files_and_shares_are_checked(tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text("{}\n")
    args = ReplayArguments(data_path=str(old), replay_path=f"{old}, {old}", replay_ratio=0.5)
    args.check()
    assert args.replay_files == [str(old)] * 2
    assert ReplayArguments(data_path=str(old)).replay_files == []
    for name, value in (("replay_path", "nowhere.jsonl"), ("replay_ratio", 1.0), ("replay_ratio", 0.0)):
        with pytest.raises(UserError, match=f"--{name} {value}"):
            ReplayArguments(data_path=str(old), **{name: value}).check()
