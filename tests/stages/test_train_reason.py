"""train_reason.py from its command line: a tuned model learns to think before it answers."""

import pytest
import torch
import torch.nn.functional as F

import train_reason
import train_sft
from minillm.data.reasoning import TAGS, parse_reasoning
from minillm.hub.huggingface import load_model
from minillm.inference import complete
from minillm.reports.tracking import read_metrics
from minillm.tokenizer import encode_chat

DATA = ["--max_seq_len", "300", "--batch_size", "4", "--log_interval", "1"]
FEW = ["--max_steps", "3", "--learning_rate", "1e-2"]


def thoughts(n, first=0):
    """Conversations of one or two turns; the last answer thinks first, and some users write tags."""
    records = []
    for number in range(first, first + n):
        asked, answer = "how many apples" + " <think>" * (number % 2), f"{number}"
        steps = " and ".join(["12 apples"] * (1 + number % 3))
        before = [{"role": "user", "content": "an old dog"}, {"role": "assistant", "content": "the fox"}]
        reply = {"role": "assistant", "content": f"<think>\n{steps}\n</think>\n<answer>\n{answer}\n</answer>"}
        records.append({"messages": before * (number % 4 == 0) + [{"role": "user", "content": asked}, reply]})
    return records


@pytest.fixture
def tuned(world_with):
    """A world with a fine-tuned model in it, and files of thoughts."""
    argv = ["--data_path", "{chat}", "--max_seq_len", "300", "--batch_size", "4", "--from_weight", ""]
    world = world_with("tuned", train_sft.main, *argv, "--max_steps", "3", "--learning_rate", "1e-2")
    world.base, world.run = world.out / "full_sft_32", world.out / "reason_32"
    world.thoughts = world.write(world.folder / "thoughts.jsonl", thoughts(12))
    world.thoughts_valid = world.write(world.folder / "thoughts_valid.jsonl", thoughts(5, first=50))
    return world


@pytest.fixture
def reason(call):
    """Run train_reason.py in a world with the usual flags."""

    def reason(world, *argv, code=0):
        argv = ["--data_path", world.thoughts, "--from_weight", "full_sft", *DATA, *FEW, *argv]
        done = call(train_reason.main, world, *argv)
        assert done.code == code, done.err
        return done

    return reason


def weighted_loss(model, tokenizer, records, tag_weight):
    """(Σ weight · −log p, Σ weight) over the tokens of the answers, one conversation at a time."""
    tags = [tokenizer.token_id(tag) for tag in TAGS]
    loss_sum = weight_sum = 0.0
    for record in records:
        ids, is_answer = encode_chat(tokenizer, record["messages"])
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0].double()
        losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        for loss, target, chosen in zip(losses.tolist(), ids[1:], is_answer[1:], strict=True):
            weight = chosen * (tag_weight if target in tags else 1.0)
            loss_sum, weight_sum = loss_sum + weight * loss, weight_sum + weight
    return loss_sum, weight_sum


def test_tags_weigh_more_in_training_and_not_in_validation(tuned, reason):
    """One update over all rows, at a rate that changes nothing: both losses must agree with those taken by hand."""
    reason(tuned, "--valid_path", tuned.thoughts_valid, "--max_steps", "1", "--accumulation_steps", "9",
           "--learning_rate", "1e-12", "--tag_weight", "7")  # fmt: skip
    train, valid = read_metrics(tuned.run / "metrics.jsonl")
    model = load_model(tuned.base).eval()
    loss_sum, weight_sum = weighted_loss(model, tuned.tokenizer, thoughts(12), 7.0)
    assert train["loss"] == pytest.approx(loss_sum / weight_sum, rel=1e-5)
    plain_sum, n_targets = weighted_loss(model, tuned.tokenizer, thoughts(12), 1.0)
    assert train["loss"] != pytest.approx(plain_sum / n_targets, rel=1e-3)
    loss_sum, n_targets = weighted_loss(model, tuned.tokenizer, thoughts(5, first=50), 1.0)
    assert valid["loss"] == pytest.approx(loss_sum / n_targets, rel=1e-5)
    assert valid["n_targets"] == n_targets


def test_thoughts_are_learned_by_heart_in_their_form(tuned, reason):
    reason(tuned, "--max_steps", "160", "--learning_rate", "1e-2", "--weight_decay", "0", "--save_interval", "0",
           "--data_path", tuned.write(tuned.folder / "few.jsonl", thoughts(2, first=1)))  # fmt: skip
    model, tokenizer = load_model(tuned.run).eval(), tuned.tokenizer
    for record in thoughts(2, first=1):
        *asked, answer = record["messages"]
        prompt, _ = encode_chat(tokenizer, asked, add_generation_prompt=True)
        (done,) = complete(model, [prompt], max_new_tokens=60, temperature=0, eos_token_id=tokenizer.im_end_id,
                           tokenizer=tokenizer)  # fmt: skip
        assert parse_reasoning(done.text) == parse_reasoning(answer["content"])
    assert "&lt;think&gt;" in (tuned.run / "summary.html").read_text(encoding="utf-8")


def test_the_run_directory_is_a_model_like_the_others(tuned, reason):
    reason(tuned, "--valid_path", tuned.thoughts_valid)
    names = {path.name for path in tuned.run.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "run.yaml", "best"} <= names
    assert "stage `reason`" in (tuned.run / "README.md").read_text(encoding="utf-8")
    first, *_, last = [row["loss"] for row in read_metrics(tuned.run / "metrics.jsonl") if row["split"] == "train"]
    assert last < first


def test_old_conversations_are_mixed_in(tuned, reason):
    one_by_one = ["--max_steps", "0", "--batch_size", "1", "--packing", "none"]
    reason(tuned, *one_by_one)
    assert [row["step"] for row in read_metrics(tuned.run / "metrics.jsonl")][-1] == 12
    reason(tuned, *one_by_one, "--replay_path", tuned.chat, "--replay_ratio", "0.25", "--overwrite")
    assert [row["step"] for row in read_metrics(tuned.run / "metrics.jsonl")][-1] == 16


def test_by_default_it_starts_from_the_preference_tuned_model(tuned, call):
    done = call(train_reason.main, tuned, "--data_path", tuned.thoughts, *DATA)
    assert done.code == 2
    assert "no weights 'rlhf'" in done.err
    assert "full_sft_32" in done.err
    assert not tuned.run.exists()


def test_a_plain_answer_is_set_aside_or_with_strict_fatal(tuned, reason, read_jsonl):
    records = [*thoughts(3), {"messages": thoughts(1)[0]["messages"][:2]}, *thoughts(7, first=5)]
    tuned.write(tuned.thoughts, records)
    done = reason(tuned, "--strict", code=2)
    assert "thoughts.jsonl, line 4: there is no <think>" in done.err
    assert done.err.count("\n") == 1
    assert not tuned.run.exists()
    reason(tuned)
    (rejected,) = read_jsonl(tuned.folder / "thoughts.jsonl.rejected.jsonl")
    assert rejected["line"] == 4


def test_another_weight_is_another_run(tuned, reason):
    reason(tuned, "--save_interval", "1")
    reason(tuned, "--from_resume")
    done = reason(tuned, "--from_resume", "--tag_weight", "2", code=2)
    assert done.err.startswith("error: ")
    assert "data" in done.err


def test_dry_run_marks_the_answers_with_their_tags(tuned, reason, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    tuned.write(tuned.thoughts, thoughts(1, first=1))
    done = reason(tuned, "--dry_run")
    marked = "".join(piece.split("\x1b[0m")[0] for piece in done.out.split("\x1b[30;42m")[1:])
    (turn,) = (message["content"] for message in thoughts(1, first=1)[0]["messages"][1:])
    assert marked == turn.replace("\n", "") + "<|im_end|>"
    assert not tuned.run.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data_path", "{folder}/chat.jsonl"], ["chat.jsonl has no usable record", "there is no <think>"]),
        (["--data_path", "{folder}/text.jsonl"], ["a text record, where chat records are expected"]),
        (["--tag_weight", "0"], ["--tag_weight 0.0: must be positive"]),
        (["--replay_path", "old.jsonl"], ["old.jsonl: no such file"]),
        (["--replay_path", "{folder}/text.jsonl"], ["text.jsonl", "a text record"]),
        (["--replay_ratio", "1"], ["--replay_ratio 1.0"]),
        (["--max_seq_len", "2"], ["--max_seq_len 2"]),
    ],
)
def test_refusals_are_one_line_before_anything_is_written(tuned, reason, options, words):
    done = reason(tuned, *[word.format(folder=tuned.folder) for word in options], code=2)
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
    assert not tuned.run.exists()
