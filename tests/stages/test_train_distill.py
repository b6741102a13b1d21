"""train_distill.py from its command line: a small student learns from a teacher, on texts and on conversations."""

import pytest
import torch

import train_distill
import train_pretrain
from minillm.hub.huggingface import load_model
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import train_bpe

TEACHER = ["--hidden_size", "48", "--intermediate_size", "64"]
DATA = ["--max_seq_len", "64", "--batch_size", "4", "--log_interval", "1"]
FEW = ["--max_steps", "3", "--learning_rate", "1e-3", "--save_interval", "2"]


@pytest.fixture
def taught(world_with):
    """A world with a teacher in it, of another width than the students'."""
    argv = ["--data_path", "{text}", *DATA, "--max_steps", "40", "--learning_rate", "1e-2", *TEACHER]
    world = world_with("taught", train_pretrain.main, *argv)
    world.teacher, world.run = world.out / "pretrain_48", world.out / "distill_32"
    return world


@pytest.fixture
def distill(call):
    """Run train_distill.py in a world with the usual flags; it must succeed."""

    def distill(world, *argv):
        usual = ["--data_path", world.text, "--teacher", "pretrain_48", *DATA, *FEW]
        done = call(train_distill.main, world, *usual, *argv)
        assert done.code == 0, done.err
        return done

    return distill


def test_the_student_comes_closer_to_its_teacher(taught, distill):
    argv = ["--valid_path", taught.text_valid, "--max_steps", "30", "--learning_rate", "1e-2", "--alpha", "0"]
    distill(taught, *argv)
    rows = [row for row in read_metrics(taught.run / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    model = load_model(taught.run)
    assert model.config.hidden_size == 32
    assert "validation loss" in (taught.run / "README.md").read_text()


@pytest.mark.parametrize(
    "options",
    [
        ["--top_k", "8", "--divergence", "js", "--temperature", "2"],
        ["--hidden_weight", "0.5", "--divergence", "reverse"],
        ["--on_policy", "1", "--max_new_tokens", "5", "--divergence", "symmetric"],
        ["--packing", "none", "--dtype", "bfloat16"],
        ["--use_moe", "--num_experts", "3", "--moe_intermediate_size", "16"],
        ["--gradient_checkpointing", "--from_weight", "{teacher}", "--hidden_size", "48"],
    ],
    ids=lambda options: " ".join(options[:2]).removeprefix("--"),
)
def test_every_option_trains(taught, distill, options):
    options = [option.format(teacher=taught.teacher) for option in options]
    distill(taught, "--valid_path", taught.text_valid, *options)
    (run,) = taught.out.glob("distill_*")
    rows = read_metrics(run / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [(1, "train"), (2, "train"), (3, "train"), (3, "valid")]
    assert (run / "model.safetensors").is_file()


def test_conversations_too(taught, distill):
    distill(taught, "--data_path", taught.chat, "--valid_path", taught.chat_valid, "--max_seq_len", "300",
            "--on_policy", "0.5", "--max_new_tokens", "6")  # fmt: skip
    assert read_metrics(taught.run / "metrics.jsonl")[-1]["split"] == "valid"


def test_a_teacher_with_experts_teaches_a_dense_student(taught, distill, call):
    argv = ["--data_path", taught.text, *DATA, *FEW, "--hidden_size", "16", "--use_moe", "--num_experts", "3"]
    assert call(train_pretrain.main, taught, *argv, "--moe_intermediate_size", "16").code == 0
    distill(taught, "--teacher", "pretrain_16_moe")
    assert load_model(taught.run).config.num_experts in (0, None)


def test_the_teacher_itself_has_nothing_to_learn(taught, distill):
    distill(taught, "--from_weight", "pretrain", "--hidden_size", "48", "--alpha", "0", "--weight_decay", "0")
    (run,) = taught.out.glob("distill_*")
    first = read_metrics(run / "metrics.jsonl")[0]
    assert first["loss"] == 0
    assert first["grad_norm"] <= 1e-7
    before, after = load_model(taught.teacher), load_model(run)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(before(ids), after(ids), rtol=1e-3, atol=1e-3)  # Adam divides nothing by nearly nothing


def test_refusals_are_one_line(taught, call, tmp_path):
    train_bpe(iter(["something else altogether"]), vocab_size=280).save(taught.folder / "other")
    for argv, words in (
        (["--teacher", "full_sft_48"], ["full_sft_48", "pretrain_48"]),
        (["--tokenizer_path", taught.folder / "other"], ["another tokenizer", "train_sft.py"]),
        (["--alpha", "2"], ["--alpha 2.0"]),
        (["--top_k", "999"], ["999", "300"]),
        (["--top_k", "9", "--max_cache_gib", "1e-9"], ["--max_cache_gib"]),
    ):
        base = ["--data_path", taught.text, "--teacher", "pretrain_48", *DATA]
        done = call(train_distill.main, taught, *base, *argv)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert all(word in done.err for word in words), done.err
        assert not taught.run.exists()


def test_every_teacher_has_a_cache_of_its_own(taught, distill, call):
    kept = ["--top_k", "4", "--teacher_cache", taught.folder / "cache"]
    distill(taught, *kept)
    argv = ["--data_path", taught.text, *DATA, "--from_weight", "pretrain", "--max_steps", "1", *TEACHER]
    assert call(train_pretrain.main, taught, *argv, "--overwrite").code == 0
    distill(taught, *kept, "--overwrite")
    assert len(list((taught.folder / "cache").iterdir())) == 2
