"""What a command without --data_path chooses."""

import pytest

from minillm.errors import UserError
from minillm.training import bare
from minillm.training.arguments import SFTArguments
from minillm.training.command_line import parse


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A current directory with own data, and with the demo world as if it had been made."""
    monkeypatch.chdir(tmp_path)
    for name in ("dataset/sft_valid.jsonl", "dataset/sft_mini.jsonl", "dataset/demo/meta.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("pretrain_train", "pretrain_valid", "sft_train", "sft_valid"):
        (tmp_path / f"dataset/demo/{name}.jsonl").write_text("")
    return tmp_path


def run(work, name):
    (work / name).mkdir(parents=True)
    (work / name / "config.json").write_text('{"hidden_size": 128}')


def test_own_data_before_the_demo_and_flags_over_both(work, capsys):
    run(work, "out/pretrain_512")
    args = parse(SFTArguments, ["--batch_size", "3"])
    assert (args.data_path, args.from_weight, args.save_dir) == ("dataset/sft_mini.jsonl", "out/pretrain_512", "out")
    assert (args.batch_size, args.preset) == (3, "small")
    assert capsys.readouterr().out.startswith("no --data_path: data dataset/sft_mini.jsonl, weights out/pretrain_512")


def test_the_demo_with_its_settings_until_its_run_is_finished(work):
    (work / "dataset/sft_mini.jsonl").unlink()
    run(work, "out/demo/pretrain_64")
    run(work, "out/demo/pretrain_128")
    args = parse(SFTArguments, ["--max_seq_len", "64"])
    assert args.data_path == "dataset/demo/sft_train.jsonl"
    assert (args.from_weight, args.save_dir) == ("out/demo/pretrain_128", "out/demo")
    assert (args.preset, args.learning_rate, args.max_seq_len) == ("demo", 2e-3, 64)
    run(work, "out/demo/full_sft_128")
    assert parse(SFTArguments, []).save_dir == "out"


def test_missing_weights_name_the_command(work):
    with pytest.raises(UserError, match=r"no pretrained weights in out/ or out/demo/: run `python train_pretrain.py`"):
        parse(SFTArguments, [])


def test_ranks_but_the_first_wait_for_what_is_made(work, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(bare, "MAX_WAIT_S", 0)
    with pytest.raises(UserError, match="did not appear"):
        bare._make(work / "never", lambda: pytest.fail("only the first makes it"), "making")
