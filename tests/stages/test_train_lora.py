"""train_lora.py from its command line: an adapter learns, the model beneath stays, eval_model.py uses it."""

import json

import pytest
import torch
from safetensors.torch import load_file

import eval_model
import train_lora
import train_sft
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints
from minillm.hub.huggingface import load_model
from minillm.lora import load_lora
from minillm.lora.core import adapted_layers
from minillm.reports.tracking import read_metrics

DATA = ["--max_seq_len", "300", "--batch_size", "4", "--log_interval", "1"]
FEW = ["--max_steps", "4", "--learning_rate", "1e-2", "--save_interval", "2"]
IDS = torch.arange(40)[None]


@pytest.fixture
def tuned(world_with):
    """A world with a fine-tuned model in it."""
    argv = ["--data_path", "{chat}", "--max_seq_len", "300", "--batch_size", "4", "--from_weight", ""]
    world = world_with("tuned", train_sft.main, *argv, "--max_steps", "3", "--learning_rate", "1e-2")
    world.base, world.run = world.out / "full_sft_32", world.out / "lora" / "lora_32"
    return world


@pytest.fixture
def lora(call):
    """Run train_lora.py in a world with the usual flags; it must succeed."""

    def lora(world, *argv):
        done = call(train_lora.main, world, "--data_path", world.chat, *DATA, *FEW, *argv)
        assert done.code == 0, done.err
        return done

    return lora


def adapted(world, **options):
    model = load_model(world.base, **options)
    load_lora(model, world.run)
    return model.eval()


def test_the_run_directory_is_an_adapter_and_the_model_beneath_stays(tuned, lora):
    before = {path.name: path.read_bytes() for path in tuned.base.iterdir() if path.is_file()}
    done = lora(tuned, "--valid_path", tuned.chat_valid, "--eval_interval", "2")
    names = {path.name for path in tuned.run.iterdir()}
    files = {"adapter_config.json", "adapter_model.safetensors", "base.json"}
    assert files | {"README.md", "run.yaml", "metrics.jsonl", "summary.png", "summary.html", "best"} <= names
    assert {path.name for path in (tuned.run / "best").iterdir()} == files
    assert not list(tuned.run.rglob("model.safetensors"))  # the model itself is not written again
    assert find_damage(list_checkpoints(tuned.run / "checkpoints")[0]) is None
    assert {path.name: path.read_bytes() for path in tuned.base.iterdir() if path.is_file()} == before
    assert json.loads((tuned.run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tuned.base)
    trained = 2 * 8 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 128))  # blocks x rank x (in + out) of all linear layers
    assert f"{trained:,} of them trained" in done.out
    assert "library_name: peft" in (tuned.run / "README.md").read_text()

    first, *_, last = [row["loss"] for row in read_metrics(tuned.run / "metrics.jsonl") if row["split"] == "train"]
    assert last < first
    model, plain = adapted(tuned), load_model(tuned.base).eval()
    assert not torch.equal(model(IDS), plain(IDS))


def test_the_first_loss_is_the_base_models(tuned, lora):
    """B is zero: before the first update nothing has changed; validation says what the model beneath says."""
    lora(tuned, "--max_steps", "1", "--accumulation_steps", "9")
    (row,) = read_metrics(tuned.run / "metrics.jsonl")
    argv = ["--from_weight", "full_sft", "--max_steps", "1", "--accumulation_steps", "9", "--learning_rate", "1e-12"]
    train_sft.main(["--save_dir", str(tuned.folder / "plain"), "--data_path", str(tuned.chat), *DATA, *argv,
                    "--from_weight", str(tuned.base), "--device", "cpu", "--dtype", "float32"])  # fmt: skip
    (wanted,) = read_metrics(tuned.folder / "plain" / "full_sft_32" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        ["--use_dora", "--lora_dropout", "0.2", "--gradient_checkpointing"],
        ["--lora_init", "pissa", "--use_rslora"],
        ["--target_modules", "attention", "--lora_layers", "1", "--rank_pattern", "q_proj=3"],
        ["--modules_to_save", "lm_head", "--loraplus_ratio", "16"],
        ["--base_dtype", "bfloat16", "--use_rslora"],
        ["--base_dtype", "bfloat16", "--dtype", "bfloat16", "--modules_to_save", "embed_tokens,self_attn"],
    ],
    ids=lambda options: options[0].removeprefix("--") + " " + options[-1],
)
def test_every_option_trains_and_comes_back(tuned, lora, options):
    lora(tuned, *options, "--accumulation_steps", "2", "--learning_rate", "3e-3")  # all 4 rows, twice
    rows = [row["loss"] for row in read_metrics(tuned.run / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1] < rows[0]
    state = load_file(list_checkpoints(tuned.run / "checkpoints")[0] / "trained.safetensors")
    half = "bfloat16" in options
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model = adapted(tuned, dtype=torch.bfloat16 if half else torch.float32)
    (end,) = {row["step"] for row in read_metrics(tuned.run / "metrics.jsonl")[-1:]}
    assert end == 4
    config = json.loads((tuned.run / "adapter_config.json").read_text())
    if "--rank_pattern" in options:
        ranks = {name: layer.lora.A.weight.shape[0] for name, layer in adapted_layers(model).items()}
        assert set(ranks) == {f"model.layers.1.self_attn.{kind}_proj" for kind in "qkvo"}
        assert ranks["model.layers.1.self_attn.q_proj"] == 3
    assert config["use_dora"] == ("--use_dora" in options)


def test_a_run_that_starts_over_keeps_the_first_look_of_its_monitor(tuned, lora):
    """The earlier run moves away after the first update, before that update's look is written."""
    for more in ([], ["--overwrite"]):
        lora(tuned, "--monitor_interval", "2", "--max_steps", "4", *more)
        assert [row["step"] for row in read_metrics(tuned.run / "monitor.jsonl")] == [1, 2, 4]


def test_old_rows_are_mixed_in(tuned, lora):
    lora(tuned, "--max_steps", "0", "--epochs", "2", "--batch_size", "1", "--packing", "none")
    without = [row["step"] for row in read_metrics(tuned.run / "metrics.jsonl")][-1]
    lora(tuned, "--max_steps", "0", "--epochs", "2", "--batch_size", "1", "--packing", "none",
         "--replay_path", str(tuned.chat_valid), "--replay_ratio", "0.25", "--overwrite")  # fmt: skip
    assert without == 2 * 12
    assert [row["step"] for row in read_metrics(tuned.run / "metrics.jsonl")][-1] == 2 * 16


def test_eval_model_adds_the_adapter(tuned, lora, call, capsys):
    lora(tuned, "--lora_name", "cooking", "--max_steps", "60", "--learning_rate", "3e-2")
    question = "an old dog had 345"
    tuned.write(tuned.folder / "asked.jsonl", [{"messages": [{"role": "user", "content": question}]}])
    argv = ["--save_dir", str(tuned.out), "--prompts", str(tuned.folder / "asked.jsonl"), "--temperature", "0"]
    answers = []
    for number, more in enumerate(([], ["--lora_name", "cooking"], ["--lora_name", "cooking:0.0001"])):
        output = tuned.folder / f"{number}.json"
        eval_model.main([*argv, "--max_new_tokens", "20", "--output", str(output), *more])
        answers.append(json.loads(output.read_text())["prompts"][0]["answer"])
    assert answers[0] == answers[2] != answers[1]
    assert "cooking_32" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        eval_model.main([*argv, "--lora_name", "medical"])
    assert ended.value.code == 2
    assert "in " + str(tuned.out) + "/lora/ there are: cooking_32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target_modules", "query"], ["no layer is called query", "q_proj"]),
        (["--lora_rank", "40", "--lora_init", "pissa"], ["rank 40", "at most"]),
        (["--lora_rank", "0"], ["rank is 0"]),
        (["--from_weight", "rlhf"], ["no weights 'rlhf'", "full_sft_32"]),
        (["--replay_path", "old.jsonl"], ["old.jsonl: no such file"]),
        (["--modules_to_save", "head"], ["no layer is called head"]),
        (["--base_dtype", "float16"], ["--base_dtype float16 on a CPU"]),
        (["--base_dtype", "bfloat16", "--modules_to_save", "lm_head"], ["trained layers are float32", "--dtype auto"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else None,
)
def test_refusals_are_one_line_before_anything_is_written(tuned, call, options, words):
    done = call(train_lora.main, tuned, "--data_path", tuned.chat, *DATA, *options)
    assert done.code == 2, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert not (tuned.out / "lora").exists()


def test_another_base_is_refused_afterwards(tuned, lora, call):
    lora(tuned)
    train_sft.main(["--save_dir", str(tuned.out), "--data_path", str(tuned.chat), *DATA, "--from_weight", "full_sft",
                    "--max_steps", "2", "--learning_rate", "1e-2", "--device", "cpu", "--dtype", "float32",
                    "--hidden_size", "32", "--overwrite"])  # fmt: skip
    done = call(lambda argv: eval_model.main(argv), tuned, "--lora_name", "lora", "--prompts", tuned.chat)
    assert done.code == 2
    assert "was made for" in done.err
    assert str(tuned.base) in done.err


def test_a_dry_run_leaves_nothing(tuned, call):
    done = call(train_lora.main, tuned, "--data_path", tuned.chat, *DATA, "--dry_run")
    assert done.code == 0, done.err
    assert "of them trained" in done.out
    assert not (tuned.out / "lora").exists()
