"""What a run says: of its data at the start, of divergence while it goes, of what to do next at the end."""

import json
import re

import pytest

import train_dpo
import train_lora
import train_pretrain
import train_sft
from minillm.training.describe import few_updates
from tests.contracts.harness import arguments
from tests.stages.conftest import conversations, documents

SHORT = ["--max_seq_len", "64", "--batch_size", "2", "--max_steps", "3", "--log_interval", "1"]
UNKNOWN_ROLE = {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]}


@pytest.fixture
def pretrained(world_with):
    """A world with a pretrained model."""
    argv = ["--data_path", "{text}", "--max_seq_len", "64", "--batch_size", "4", "--max_steps", "20",
            "--learning_rate", "1e-2"]  # fmt: skip
    return world_with("announced", train_pretrain.main, *argv)


def test_a_run_says_what_it_does_and_how_to_go_on(pretrained, call):
    world = pretrained
    world.write(world.chat, [*conversations(40), "{", UNKNOWN_ROLE, UNKNOWN_ROLE])
    argv = ["--data_path", world.chat, "--valid_path", world.chat_valid, *SHORT]
    done = call(train_sft.main, world, *argv)
    assert done.code == 0, done.err
    assert "\r" not in done.out + done.err
    assert "\x1b" not in done.out + done.err
    assert done.err == ""
    lines = done.out.splitlines()
    entries = {line[2:18].strip(): line[18:] for line in lines if re.match(r"  \w", line)}
    assert entries["weights"] == str(world.out / "pretrain_32")
    assert entries["tokenizer"] == f"{world.out / 'pretrain_32'}, 300 tokens"
    assert entries["training data"] == f"43 records read from {world.chat}"
    assert entries["validation data"] == f"4 records read from {world.chat_valid}"
    assert entries["updates"] == "3, each of 2 rows x 64 tokens; --max_steps 3"
    assert entries["rate"] == "5e-5, cosine, 1 step of warm-up"
    assert entries["device"] == "cpu, float32, 1 rank (ddp)"
    assert entries["directory"] == str(world.out / "full_sft_32")
    (rejected,) = [line for line in lines if "3 rejected (7.0%)" in line]
    assert f"{world.chat}.rejected.jsonl" in rejected
    for reason, line_number in (("2 x message 0 has the unknown role 'narrator'", 42), ("1 x broken JSON", 41)):
        assert any(reason in line and f"{world.chat}:{line_number}" in line for line in lines)
    steps = [line for line in lines if line.startswith("step ") and ":" not in line.split()[1]]
    pattern = r"step (\d)/3  epoch 0\.\d\d  loss \d\.\d{4}  lr \de-\d|\d\.\de-\d  tok/s [\d,]+  mem .*  eta \d:\d\d"
    assert [re.match(pattern, line)[1] for line in steps] == ["1", "2", "3"]
    first_step = lines.index(steps[0])
    assert lines.index("  directory       " + entries["directory"]) < first_step
    run = world.out / "full_sft_32"
    valid = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert entries["validation"] == f"loss {valid:.4f} nats/token"
    assert entries["best"] == f"loss {valid:.4f} at step 3, kept in {run / 'best'}"
    assert entries["page"] == str(run / "summary.html")
    assert entries["metrics"] == str(run / "metrics.jsonl")
    assert entries["next"] == f"python eval_model.py --from_weight {run} --model_mode 1"
    resumed = call(train_sft.main, world, *argv, "--from_resume").out
    assert "; resumed at step 3" in resumed


def test_an_adapter_is_tried_on_its_model(pretrained, call):
    world = pretrained
    argv = ["--data_path", world.chat, "--from_weight", "pretrain", "--lora_name", "cooking", *SHORT]
    out = call(train_lora.main, world, *argv).out
    base, adapter = world.out / "pretrain_32", world.out / "lora" / "cooking_32"
    assert f"python eval_model.py --from_weight {base} --lora_name {adapter} --model_mode 1\n" in out
    assert "from scratch" not in out


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_the_model_has_not_are_refused(pretrained, call, bias):
    world = pretrained
    done = call(train_lora.main, world, "--data_path", world.chat, "--from_weight", "pretrain", "--lora_bias", bias)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert re.match(rf"error: bias='{bias}' .*: .* bias; leave it out", done.err), done.err
    assert not (world.out / "lora").exists()


@pytest.mark.parametrize("what", ["training", "validation", "replayed"])
def test_a_run_ends_when_more_than_a_tenth_is_rejected(pretrained, call, what):
    world = pretrained
    bad = world.write(world.folder / "bad.jsonl", [*conversations(8), UNKNOWN_ROLE, UNKNOWN_ROLE])
    files = {"training": world.chat, "validation": world.chat_valid, "replayed": world.chat} | {what: bad}
    argv = ["--data_path", files["training"], "--valid_path", files["validation"], "--from_weight", "pretrain", *SHORT]
    main = train_lora.main if what == "replayed" else train_sft.main
    argv += ["--replay_path", files["replayed"]] if what == "replayed" else []
    done = call(main, world, *argv)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    flag = {"training": "--data_path", "validation": "--valid_path", "replayed": "--replay_path"}[what]
    for words in (f"error: {flag}: 2 of 10 records (20%)", "unknown role 'narrator'", f"{bad}:9",
                  f"{bad}.rejected.jsonl", "--allow_rejected"):  # fmt: skip
        assert words in done.err
    assert not (world.out / "full_sft_32").exists()
    assert not (world.out / "lora").exists()
    done = call(main, world, *argv, "--allow_rejected")
    assert done.code == 0, done.err
    assert "2 rejected (20.0%)" in done.out


@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_pairs_that_are_too_long_count_as_rejected(pretrained, call, reference):
    world = pretrained
    lengths = [200 if number % 3 == 0 else 1 for number in range(12)]
    pairs = [{"prompt": f"the {n}", "chosen": "fox", "rejected": "dog " * length} for n, length in enumerate(lengths)]
    path = world.write(world.folder / "pairs.jsonl", pairs)
    argv = ["--data_path", path, "--from_weight", "pretrain", "--reference", reference, *SHORT]
    done = call(train_dpo.main, world, *argv)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "4 of 12 records (33%)" in done.err
    assert "--max_seq_len 64 allows 65" in done.err
    assert not (world.out / "rlhf_32").exists()
    assert not (world.out / ".reference_cache").exists()  # what costs time comes afterwards
    done = call(train_dpo.main, world, *argv, "--allow_rejected")
    assert done.code == 0, done.err
    assert "8 pairs, " in done.out


def test_answers_cut_at_the_row_are_said(pretrained, call):
    world = pretrained
    talk = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox " * 100}]
    world.write(world.chat, [*conversations(12), {"messages": talk}])
    out = call(train_sft.main, world, "--data_path", world.chat, *SHORT).out
    n_cut, n_lost = re.search(r"(\d+) cut at --max_seq_len, (\d+) targets lost", out).groups()
    assert int(n_cut) >= 1
    assert int(n_lost) > 50


def test_divergence_is_said_in_the_log_at_the_end_and_on_the_page(pretrained, call):
    world = pretrained
    argv = ["--data_path", world.chat, "--valid_path", world.chat_valid, "--max_seq_len", "64", "--batch_size", "2"]
    calm = call(train_sft.main, world, *argv, "--learning_rate", "1e-3", "--max_steps", "30", "--log_interval", "1")
    assert calm.code == 0, calm.err
    assert "diverges" not in calm.out
    done = call(train_sft.main, world, *argv, "--learning_rate", "10", "--max_steps", "30", "--overwrite")
    assert done.code == 0, done.err
    warnings = [line for line in done.out.splitlines() if line.startswith("warning: step")]
    assert len(warnings) == 2  # of training and of validation, once each
    assert all("--learning_rate (now 10)" in line for line in warnings)
    footer = done.out[done.out.index("full_sft_32: 30 steps") :]
    page = (world.out / "full_sft_32" / "summary.html").read_text()
    for line in warnings:
        assert line.removeprefix("warning: ") in footer
        assert line.split(";")[0].removeprefix("warning: ") in page


def test_few_updates_are_warned_about(world, call, tmp_path):
    world.write(world.text, documents(12))
    out = call(train_pretrain.main, world, "--data_path", world.text, "--max_seq_len", "64", "--batch_size", "4").out
    (line,) = [line for line in out.splitlines() if line.startswith("warning: only")]
    for flag in ("--epochs (now 1)", "--batch_size (now 4)", "--max_seq_len (now 64)", "--packing none"):
        assert flag in line
    args = arguments(tmp_path, max_steps=0, batch_size=8, epochs=2, packing="none")
    assert few_updates(50, args) == ""
    assert "raise --epochs (now 2) to 3, or lower --batch_size (now 8) for more" in few_updates(49, args)
    assert "lower --accumulation_steps (now 2)" in few_updates(9, arguments(tmp_path, accumulation_steps=2))


def test_flags_that_contradict_each_other_are_refused(world, call, refused):
    argv = ["--data_path", world.text, "--global_batch_size", "16", "--batch_size", "4", "--accumulation_steps", "3"]
    done = call(train_pretrain.main, world, *argv, "--max_steps", "1")
    refused(done, world, "--accumulation_steps 3", "--global_batch_size is 16", "12 rows")
    argv = [*argv[:-1], "4", "--max_steps", "1"]  # which is what the other two say
    assert call(train_pretrain.main, world, *argv).code == 0
