"""train_dpo.py from its command line: preferences are learnt, a model or an adapter written, bad pairs named."""

import math

import pytest
import torch
from safetensors.torch import load_file

import eval_model
import train_dpo
import train_sft
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints
from minillm.hub.huggingface import load_model
from minillm.lora import load_lora
from minillm.reports.tracking import read_metrics

from .conftest import sentence

DATA = ["--max_seq_len", "150", "--batch_size", "2", "--log_interval", "1"]
FEW = ["--max_steps", "3", "--learning_rate", "1e-3", "--save_interval", "2"]


def pair(number: int) -> dict:
    """The longer reply is chosen."""
    question = {"role": "user", "content": sentence(number, 1 + number % 4)}
    replies = sentence(number + 3, 4 + number % 3), sentence(number + 3, 1)
    sides = ({"role": "assistant", "content": reply} for reply in replies)
    return dict(zip(("chosen", "rejected"), ([question, side] for side in sides), strict=True))


@pytest.fixture
def tuned(world_with):
    """A world with a fine-tuned model in it, and pairs."""
    argv = ["--data_path", "{chat}", "--max_seq_len", "300", "--batch_size", "4", "--from_weight", ""]
    world = world_with("tuned", train_sft.main, *argv, "--max_steps", "3", "--learning_rate", "1e-2")
    world.base, world.run = world.out / "full_sft_32", world.out / "rlhf_32"
    world.pairs = world.write(world.folder / "pairs.jsonl", [pair(n) for n in range(14)])
    world.held = world.write(world.folder / "held.jsonl", [pair(n) for n in range(40, 47)])
    return world


@pytest.fixture
def dpo(call):
    """Run train_dpo.py in a world with the usual flags; it must succeed."""

    def dpo(world, *argv):
        done = call(train_dpo.main, world, "--data_path", world.pairs, *DATA, *FEW, *argv)
        assert done.code == 0, done.err
        return done

    return dpo


def test_it_learns_what_is_preferred_and_writes_a_model(tuned, dpo, call):
    argv = ["--valid_path", tuned.held, "--max_steps", "30", "--learning_rate", "3e-3", "--eval_interval", "15"]
    done = dpo(tuned, *argv)
    names = {path.name for path in tuned.run.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "best", "summary.html", "summary.png"} <= names
    assert find_damage(list_checkpoints(tuned.run / "checkpoints")[0]) is None
    rows = read_metrics(tuned.run / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["margin"] == 0
    assert last["split"] == "valid"
    assert last["n_targets"] == 7
    assert last["accuracy"] == 1
    assert last["loss"] < 0.6
    assert "nats/pair" in done.out
    assert "accuracy 1" in done.out
    eval_model.main(["--save_dir", str(tuned.out), "--model_mode", "2", "--task_file", str(tuned.chat),
                     "--max_new_tokens", "4"])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ["--loss_type", "kto"],
        ["--loss_type", "ipo", "--reference", "cached", "--packing", "none"],
        ["--loss_type", "simpo", "--beta", "2", "--gamma", "0.5"],
        ["--loss_type", "orpo"],
        ["--loss_type", "robust", "--label_smoothing", "0.1", "--gradient_checkpointing"],
        ["--sft_weight", "0.5", "--dtype", "bfloat16", "--loss_type", "hinge"],
    ],
    ids=lambda options: options[1] + " " + options[-1],
)
def test_every_loss_trains(tuned, dpo, options):
    dpo(tuned, "--valid_path", tuned.held, *options)
    rows = read_metrics(tuned.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert all(math.isfinite(row["loss"]) for row in rows)
    before, after = (load_file(path / "model.safetensors") for path in (tuned.base, tuned.run))
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_an_adapter_alone(tuned, dpo):
    """One model in memory: its reference is itself with the adapter off."""
    before = (tuned.base / "model.safetensors").read_bytes()
    dpo(tuned, "--lora_name", "polite", "--learning_rate", "1e-2", "--max_steps", "12")
    directory = tuned.out / "lora" / "polite_32"
    rows = read_metrics(directory / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows[-1]["margin"] > 0
    assert (tuned.base / "model.safetensors").read_bytes() == before
    assert not tuned.run.exists()
    model, plain = load_model(tuned.base), load_model(tuned.base)
    load_lora(model, directory)
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids), plain(ids))


def test_judged_replies(tuned, dpo):
    lines = []
    for number in range(12):
        record = pair(number)
        for label, side in ((True, "chosen"), (False, "rejected")):
            question, reply = record[side]
            lines.append({"prompt": [question], "completion": [reply], "label": label})
    judged = tuned.write(tuned.folder / "judged.jsonl", lines)
    argv = ["--data_path", judged, "--valid_path", judged, "--max_steps", "20", "--learning_rate", "3e-3"]
    done = dpo(tuned, "--loss_type", "kto", *argv)
    rows = read_metrics(tuned.run / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(0.5, rel=1e-6)
    assert rows[-1]["loss"] < 0.47
    assert rows[-1]["reward_good"] > rows[-1]["reward_bad"] + 0.1
    assert "nats/reply" in done.out


def test_a_dry_run_leaves_nothing(tuned, call, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = call(train_dpo.main, tuned, "--data_path", tuned.pairs, *DATA, "--dry_run")
    assert done.code == 0, done.err
    assert "\x1b[30;42m" in done.out
    assert "steps:" in done.out
    assert not tuned.run.exists()


BAD = {
    "prompts differ": ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                        "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
                       "share every message but the last"),
    "equal": ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal"),
    "empty answer": ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is an empty answer"),
    "no pair": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "chat record"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_pair_is_set_aside_or_with_strict_fatal(tuned, call, read_jsonl, bad):
    record, word = BAD[bad]
    tuned.write(tuned.pairs, [*(pair(n) for n in range(4)), record, *(pair(n) for n in range(5, 11))])
    done = call(train_dpo.main, tuned, "--data_path", tuned.pairs, *DATA, "--strict")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "line 5" in done.err
    assert word in done.err
    done = call(train_dpo.main, tuned, "--data_path", tuned.pairs, *DATA, *FEW)
    assert done.code == 0, done.err
    (rejected,) = read_jsonl(tuned.folder / "pairs.jsonl.rejected.jsonl")
    assert rejected["line"] == 5
    assert word in rejected["reason"]


def test_refusals_come_before_anything_is_written(tuned, call):
    for argv, word in (
        (["--beta", "0"], "--beta 0.0"),
        (["--from_weight", "pretrain"], "no weights 'pretrain'"),
        (["--loss_type", "simpo", "--reference", "cached"], "has none"),
        (["--max_seq_len", "4"], "--max_seq_len 4"),
    ):
        done = call(train_dpo.main, tuned, "--data_path", tuned.pairs, *DATA, *argv)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert word in done.err
        assert not tuned.run.exists()


def test_every_reference_has_a_cache_of_its_own(tuned, dpo):
    cached = ["--reference", "cached", "--reference_cache", str(tuned.folder / "cache")]
    n_caches = []
    for changes in ([], [], ["--from_weight", "rlhf"], ["--rope_scaling", "linear:4"]):
        dpo(tuned, *cached, *changes, "--overwrite")
        n_caches.append(len(list((tuned.folder / "cache").iterdir())))
    assert n_caches == [1, 1, 2, 3]
