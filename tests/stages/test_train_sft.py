"""train_sft.py from its command line: only answers are learned, from the pretrained weights on."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import train_pretrain
import train_sft
from minillm.checkpoints.checkpoint import find_damage, list_checkpoints
from minillm.hub.huggingface import load_model
from minillm.inference import generate
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat, train_bpe

DATA = ["--max_seq_len", "300", "--batch_size", "4"]


@pytest.fixture
def pretrained(world_with):
    """A world with a pretrained model in it."""
    argv = ["--data_path", "{text}", "--max_seq_len", "32", "--max_steps", "3", "--learning_rate", "1e-2"]
    world = world_with("pretrained", train_pretrain.main, *argv)
    world.pretrain, world.run = world.out / "pretrain_32", world.out / "full_sft_32"
    return world


def conversations_of(path):
    return [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]


def answer_loss(model, tokenizer, conversations, train_on="all"):
    """Σ −log p over the tokens of the answers, and their number, one conversation at a time."""
    loss_sum = n_targets = 0.0
    for messages in conversations:
        # "per_turn" teaches the same tokens as "all", in rows of their own.
        ids, is_answer = encode_chat(tokenizer, messages, train_on="last" if train_on == "last" else "all")
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0].double()
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        chosen = torch.tensor(is_answer[1:]).bool()
        assert len(ids) <= 300, "a cut conversation would make the two sums differ"
        loss_sum += float(losses[chosen].sum())
        n_targets += int(chosen.sum())
    return loss_sum, n_targets


@pytest.mark.parametrize(
    ("train_on", "packing"), [("all", "best_fit"), ("all", "none"), ("last", "best_fit"), ("per_turn", "none")]
)
def test_the_first_loss_is_that_of_the_answers_under_the_pretrained_weights(pretrained, call, train_on, packing):
    """One update over all rows, at a rate that changes nothing: training and validation must both agree by hand."""
    argv = ["--data_path", pretrained.chat, "--valid_path", pretrained.chat_valid, *DATA, "--max_steps", "1"]
    argv += ["--accumulation_steps", "9", "--log_interval", "1", "--learning_rate", "1e-12"]
    done = call(train_sft.main, pretrained, *argv, "--train_on", train_on, "--packing", packing)
    assert done.code == 0, done.err
    train, valid = read_metrics(pretrained.run / "metrics.jsonl")
    model = load_model(pretrained.pretrain).eval()
    for row, file in ((train, pretrained.chat), (valid, pretrained.chat_valid)):
        loss_sum, n_targets = answer_loss(model, pretrained.tokenizer, conversations_of(file), train_on)
        assert row["loss"] == pytest.approx(loss_sum / n_targets, rel=1e-5)
    assert valid["n_targets"] == n_targets
    assert "warning" not in done.out  # not from scratch, so ln V does not matter
    before, after = load_model(pretrained.pretrain).state_dict(), load_model(pretrained.run).state_dict()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-9)


def test_the_run_directory_holds_everything_and_opens_in_transformers(pretrained, call):
    transformers = pytest.importorskip("transformers")
    argv = ["--data_path", pretrained.chat, "--valid_path", pretrained.chat_valid, *DATA, "--epochs", "2"]
    done = call(train_sft.main, pretrained, *argv, "--learning_rate", "3e-3", "--log_interval", "1")
    assert done.code == 0, done.err
    model_files = {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "chat_template.jinja"
    }  # fmt: skip
    names = {path.name for path in pretrained.run.iterdir()}
    assert model_files | {"README.md", "run.yaml", "metrics.jsonl", "summary.png", "summary.html", "best"} <= names
    assert {path.name for path in (pretrained.run / "best").iterdir()} >= model_files
    assert find_damage(list_checkpoints(pretrained.run / "checkpoints")[0]) is None
    rows = [row for row in read_metrics(pretrained.run / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["epoch"] == 2
    assert rows[-1]["tokens"] == 2 * rows[len(rows) // 2 - 1]["tokens"]  # both passes saw the same

    ours = load_model(pretrained.run).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(pretrained.run).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained.run)
    ends = theirs.generation_config.eos_token_id
    assert ends == [pretrained.tokenizer.eos_token_id, pretrained.tokenizer.im_end_id]  # a turn's end ends an answer
    for messages in conversations_of(pretrained.chat_valid):
        # transformers' own template, tokenizer and loop, on what ours saved
        question = [m for m in messages if m["role"] != "assistant"][:1]
        question = question if question[0]["role"] == "user" else messages[:2]
        text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert prompt == encode_chat(pretrained.tokenizer, question, add_generation_prompt=True)[0]
        with torch.no_grad():
            a, b = ours(torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        reference = theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0].tolist()
        mine = generate(ours, [prompt], max_new_tokens=9, temperature=0, eos_token_id=ends)[0]
        assert prompt + mine == reference


def test_one_batch_is_learned_by_heart_and_answered(world, call):
    turns = [("how many apples", "12 and 345"), ("who saw the dog", "an old fox")]
    records = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    world.write(world.chat, records)
    argv = ["--data_path", world.chat, *DATA, "--from_weight", "", "--max_steps", "70", "--learning_rate", "2e-2"]
    done = call(train_sft.main, world, *argv, "--log_interval", "1", "--save_interval", "0", "--weight_decay", "0")
    assert done.code == 0, done.err
    rows = read_metrics(world.out / "full_sft_32" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(world.tokenizer.vocab_size), abs=0.3)  # fresh weights
    assert rows[-1]["loss"] < 0.02
    model = load_model(world.out / "full_sft_32").eval()
    for question, answer in turns:
        prompt, _ = encode_chat(world.tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        end = world.tokenizer.im_end_id
        ids = generate(model, [prompt], max_new_tokens=30, temperature=0, eos_token_id=end)[0]
        assert ids[-1] == end
        assert world.tokenizer.decode(ids[:-1]) == answer


def test_dry_run_marks_the_answers_alone(pretrained, call, monkeypatch):
    turn = [{"role": "user", "content": "an old fox"}, {"role": "assistant", "content": "345 apples"}]
    pretrained.write(pretrained.chat, [{"messages": turn}])
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = call(train_sft.main, pretrained, "--data_path", pretrained.chat, *DATA, "--dry_run")
    assert done.code == 0, done.err
    marked = done.out.split("\x1b[30;42m")[1:]
    assert [piece.split("\x1b[0m")[0] for piece in marked] == ["345 apples<|im_end|>"]
    assert not pretrained.run.exists()


def test_wandb_offline(pretrained, call, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = ["--data_path", pretrained.chat, *DATA, "--max_steps", "1", "--use_wandb"]
    assert call(train_sft.main, pretrained, *argv).code == 0
    assert len(list(pretrained.run.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_a_non_finite_loss_stops_the_run(pretrained, call, monkeypatch):
    real, calls = train_sft.causal_lm_loss, []

    def breaks_at_step_2(model, batch, router_stats=None):
        calls.append(1)
        loss_sum, n_targets = real(model, batch, router_stats)
        return loss_sum * (float("nan") if len(calls) == 2 else 1.0), n_targets

    monkeypatch.setattr(train_sft, "causal_lm_loss", breaks_at_step_2)
    argv = ["--data_path", pretrained.chat, *DATA, "--save_interval", "1", "--epochs", "9"]
    done = call(train_sft.main, pretrained, *argv)
    assert done.code == 2
    (line,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "step 2" in line
    assert [path.name for path in list_checkpoints(pretrained.run / "checkpoints")] == ["step-00000001"]
    assert len(list(pretrained.run.glob("nonfinite-step-00000002*.pt"))) == 1
    assert not (pretrained.run / "model.safetensors").exists()


USER, ANSWER = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "old"}
GOOD = {"messages": [USER, ANSWER]}
BAD = {
    "broken JSON": ('{"messages": [', "JSON"),
    "unknown role": ({"messages": [USER, {"role": "robot", "content": "a"}]}, "robot"),
    "no assistant": ({"messages": [USER]}, "assistant"),
    "no messages": ({"messages": []}, ""),
    "another schema": ({"something": 1}, ""),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_set_aside_or_with_strict_fatal(pretrained, call, read_jsonl, bad):
    record, word = BAD[bad]
    pretrained.write(pretrained.chat, [GOOD] * 6 + [record] + [GOOD] * 5)
    argv = ["--data_path", pretrained.chat, *DATA]
    done = call(train_sft.main, pretrained, *argv, "--strict")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "line 7" in done.err
    assert word in done.err
    assert not pretrained.run.exists()
    done = call(train_sft.main, pretrained, *argv, "--max_steps", "1")
    assert done.code == 0, done.err
    (rejected,) = read_jsonl(pretrained.folder / "chat.jsonl.rejected.jsonl")
    assert rejected["line"] == 7
    assert word in rejected["reason"]


@pytest.mark.parametrize("bad", BAD)
def test_nothing_but_bad_lines_is_refused(pretrained, call, bad):
    pretrained.write(pretrained.chat, [BAD[bad][0]] * 3)
    done = call(train_sft.main, pretrained, "--data_path", pretrained.chat, *DATA)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ")
    assert "chat.jsonl" in done.err
    assert not pretrained.run.exists()


def test_a_tokenizer_larger_than_the_weights_is_refused(pretrained, call):
    texts = [pretrained.text.read_text(encoding="utf-8")] * 2
    train_bpe(iter(texts), vocab_size=310).save(pretrained.folder / "larger")
    argv = ["--data_path", pretrained.chat, *DATA, "--tokenizer_path", pretrained.folder / "larger"]
    done = call(train_sft.main, pretrained, *argv)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert all(word in done.err for word in ("310", "300", "--tokenizer_path"))
    assert not pretrained.run.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["no weights 'pretrain'", "pretrain_32", "there are: none"]),
        (["--from_weight", "{folder}/missing.pth"], ["missing.pth"]),
        (["--from_weight", "", "--data_path", "{folder}/text.jsonl"], ["text.jsonl"]),
        (["--from_weight", "", "--data_path", "{folder}/empty.jsonl"], ["empty.jsonl"]),
        (["--from_weight", "", "--max_seq_len", "2"], ["max_seq_len 2"]),
        (["--from_weight", "", "--max_seq_len", "0"], ["max_seq_len 0"]),
        (["--from_weight", "", "--global_batch_size", "6"], ["6", "4", "multiple"]),
        (["--from_weight", "", "--save_dir", "{folder}/empty.jsonl/out"], ["empty.jsonl"]),
    ],
)  # fmt: skip
def test_refusals(world, call, refused, argv, words):
    (world.folder / "empty.jsonl").write_text("")
    argv = [word.format(folder=world.folder) for word in argv]
    argv = ["--data_path", world.chat, *DATA, "--tokenizer_path", world.out / "tokenizer", *argv]
    refused(call(train_sft.main, world, *argv), world, *words)
