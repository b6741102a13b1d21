"""What a command without --data_path chooses."""

import json
import re

import pytest

from minillm.cli import bare
from minillm.cli.arguments import DistillArguments, LoRAArguments, PretrainArguments, SFTArguments
from minillm.cli.command_line import parse
from minillm.config import ModelConfig
from minillm.data.sources.known_names import KNOWN_NAMES
from minillm.errors import UserError


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A current directory with the demo world as if it had been made, and a repository without data elsewhere."""
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "repository"
    write(repository / "dataset/make_demo.py")
    (repository / "configs").symlink_to(bare.ROOT / "configs")
    monkeypatch.setattr(bare, "ROOT", repository)
    names = ("pretrain_train", "pretrain_valid", "sft_train", "sft_valid", "identity_train", "identity_test")
    for name in (*(f"{name}.jsonl" for name in names), "meta.json"):
        write(tmp_path / "dataset/demo" / name)
    return tmp_path


@pytest.fixture
def own_data(work):
    """The names under which data of one's own is looked for, and one that is held out."""
    for name in ("pretrain_mini", "sft_valid", "sft_mini", "lora_law"):
        write(work / f"dataset/{name}.jsonl")


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(name, *, hidden_size=128, file="config.json"):
    config = ModelConfig.preset("demo", vocab_size=64, hidden_size=hidden_size)
    write(bare.Path(name) / file, json.dumps(config.to_hf()))


def test_own_data_before_the_demo_and_flags_over_both(own_data, capsys):
    run("out/pretrain_512", hidden_size=512)
    args = parse(SFTArguments, ["--batch_size", "3"])
    assert (args.data_path, args.from_weight, args.save_dir) == ("dataset/sft_mini.jsonl", "out/pretrain_512", "out")
    assert (args.batch_size, args.preset, args.run_name) == (3, "small", "")
    said = "no --data_path: data dataset/sft_mini.jsonl, weights out/pretrain_512, results in out/full_sft_512\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_the_known_names_are_those_of_the_page(page):
    text = (bare.Path(__file__).parents[2] / "dataset" / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `train_(\w+)\.py` \| (.+) \|$", text, flags=re.M))
    assert {name: tuple(re.findall("`(.+?)`", row)) for name, row in rows.items()} == KNOWN_NAMES


def test_an_adapter_is_named_after_its_data(own_data):
    run("out/full_sft_512", hidden_size=512)
    assert parse(LoRAArguments, []).lora_name == "law"
    run("out/lora/law_512", file="adapter_config.json")
    assert parse(LoRAArguments, []).lora_name == "law-2"


def test_the_demo_with_its_settings(work):
    run("out/demo/pretrain_64", hidden_size=64)
    run("out/demo/pretrain_128")
    args = parse(SFTArguments, ["--max_seq_len", "64"])
    assert args.data_path == "dataset/demo/sft_train.jsonl"
    assert (args.from_weight, args.save_dir, args.run_name) == ("out/demo/pretrain_128", "out/demo", "")
    assert (args.preset, args.learning_rate, args.max_seq_len) == ("demo", 2e-3, 64)
    run("out/pretrain_512", hidden_size=512)
    assert parse(SFTArguments, []).save_dir == "out"  # one's own weights, and their run beside them


def test_a_finished_run_gets_a_neighbour(work, capsys):
    run("out/demo/pretrain_128")
    run("out/demo/full_sft_128")
    assert parse(SFTArguments, []).run_name == "full_sft_128-2"
    said = capsys.readouterr().out
    assert said.endswith("results in out/demo/full_sft_128-2 (out/demo/full_sft_128 holds a finished run)\n")
    run("out/demo/full_sft_128-2")
    assert parse(SFTArguments, []).run_name == "full_sft_128-3"
    assert parse(SFTArguments, ["--from_resume"]).run_name == "full_sft_128-2"
    assert parse(SFTArguments, ["--overwrite"]).run_name == ""
    assert parse(SFTArguments, ["--run_name", "mine"]).run_name == "mine"
    assert parse(DistillArguments, ["--hidden_size", "96"]).run_name == ""
    run("out/demo/distill_64", hidden_size=64)
    assert parse(DistillArguments, []).run_name == "distill_64-2"  # of the student's width, which is not its teacher's


def test_an_unfinished_run_is_what_a_resume_means(work):
    run("out/demo/full_sft_128")
    run("out/demo/lora/identity_128", file="adapter_config.json")
    run("out/demo/lora/identity-2_128/checkpoints/step-00000001", file="adapter_config.json")
    assert parse(LoRAArguments, ["--from_resume"]).lora_name == "identity-2"
    assert parse(LoRAArguments, []).lora_name == "identity-2"  # Run then says that it is unfinished
    run("out/demo/lora/identity-2_128", file="adapter_config.json")
    assert parse(LoRAArguments, []).lora_name == "identity-3"
    assert parse(LoRAArguments, ["--lora_name", "identity"]).lora_name == "identity"


def test_a_restart_by_torchrun_goes_on_where_it_was(work, monkeypatch):
    run("out/demo/pretrain_128")
    run("out/demo/full_sft_128")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert parse(SFTArguments, []).run_name == ""


@pytest.mark.parametrize("flags", [["--use_moe"], ["--preset", "moe"], ["--use_moe", "0"], ["--hidden_size", "64"]])
def test_the_directory_is_that_of_the_shape(work, flags):
    write(work / "out/demo/tokenizer/tokenizer.json")
    names = {"--use_moe": "pretrain_128_moe", "--preset": "pretrain_640_moe", "--hidden_size": "pretrain_64"}
    name = "pretrain_128" if flags[-1] == "0" else names[flags[0]]
    assert parse(PretrainArguments, flags).run_name == ""
    run(f"out/demo/{name}")
    assert parse(PretrainArguments, flags).run_name == f"{name}-2"


def test_missing_weights_name_the_commands(work):
    message = r"no pretrained weights in out/ or out/demo/: run `python train_pretrain.py` first"
    with pytest.raises(UserError, match=message):
        parse(SFTArguments, [])
    with pytest.raises(UserError, match=r"run `python train_pretrain.py`, then `python train_sft.py` first"):
        parse(LoRAArguments, [])
    checkpoint = "out/demo/pretrain_128/checkpoints/step-00000001"
    run(checkpoint)
    n_bytes = (work / checkpoint / "config.json").stat().st_size
    manifest = {"files": {"config.json": {"bytes": n_bytes, "sha256": ""}}}
    write(work / checkpoint / "manifest.json", json.dumps(manifest))
    with pytest.raises(UserError, match=rf"pretrain_128 is an interrupted run: .*--from_weight {checkpoint}"):
        parse(SFTArguments, [])


def test_from_elsewhere_data_and_settings_are_the_repositorys(work):
    repository = work / "repository"
    (work / "dataset/demo").rename(repository / "dataset/demo")
    run("out/demo/pretrain_128")
    args = parse(SFTArguments, [])
    assert args.data_path == str(repository / "dataset/demo/sft_train.jsonl")
    assert args.valid_path == str(repository / "dataset/demo/sft_valid.jsonl")
    assert args.save_dir == "out/demo"  # of the current directory
    write(repository / "dataset/sft_own.jsonl")
    assert parse(SFTArguments, []).data_path == str(repository / "dataset/sft_own.jsonl")


def test_ranks_but_the_first_wait_for_what_is_made(work, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(bare, "MAX_WAIT_S", 0)
    with pytest.raises(UserError, match="did not appear"):
        bare._make_once(work / "never", lambda: pytest.fail("only the first makes it"), "making")
