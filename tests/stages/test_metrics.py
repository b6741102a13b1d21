"""Metrics in the validations of a stage, from its command line: rows, best/, samples, page, ranks, refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
import train_lora
import train_pretrain
import train_reason
import train_sft
from minillm.data.records import read_records
from minillm.evaluation import exact_match, token_f1
from minillm.hub.huggingface import load_model
from minillm.reports.tracking import read_metrics

ROOT = Path(__file__).parents[2]
DATA = ["--max_seq_len", "150", "--batch_size", "4", "--log_interval", "1"]
FACTS = [
    ("who saw the dog", "an old fox"),
    ("how many apples", "12"),
    ("小明 had", "水果"),
    ("an old", "the little dog"),
]


@pytest.fixture
def facts(world):
    """A world whose conversations can be learned by heart; the validation asks the same and two it cannot know."""
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in FACTS]
    unknown = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": "345 345"}] for q in ("345", "the fox")
    ]
    world.write(world.chat, [{"messages": talk} for talk in talks])
    world.write(world.chat_valid, [{"messages": talk} for talk in talks + unknown])
    world.run = world.out / "full_sft_32"
    return world


LEARN = ["--from_weight", "", "--max_steps", "45", "--learning_rate", "2e-2", "--eval_interval", "15",
         "--weight_decay", "0"]  # fmt: skip


def valid_rows(run):
    return [row for row in read_metrics(run / "metrics.jsonl") if row["split"] == "valid"]


def test_answers_are_measured_shown_over_time_and_choose_the_best_weights(facts, call, read_jsonl):
    argv = ["--data_path", facts.chat, "--valid_path", facts.chat_valid, *DATA, *LEARN]
    done = call(train_sft.main, facts, *argv, "--eval_metric", "exact,f1,accuracy,rouge_l,bleu")
    assert done.code == 0, done.err
    rows = valid_rows(facts.run)
    assert [row["step"] for row in rows] == [15, 30, 45]
    names = ("exact", "f1", "accuracy", "rouge_l", "bleu")
    assert all(name in row for row in rows for name in names)
    assert rows[-1]["exact"] >= 0.5  # what was learned
    best = max(rows, key=lambda row: (row["exact"], -row["step"]))
    assert f"exact {best['exact']:.4g}" in done.out
    assert done.result["exact"] == rows[-1]["exact"]
    # The exported weights give the same values once more.
    records = list(read_records(facts.chat_valid))
    for directory, row in ((facts.run, rows[-1]), (facts.run / "best", best)):
        again = exact_match(load_model(directory), facts.tokenizer, records, max_new_tokens=24)
        assert again.accuracy == row["exact"]
    answers = exact_match(load_model(facts.run), facts.tokenizer, records, max_new_tokens=24).answers
    f1 = token_f1([answer.answer for answer in answers], [answer.expected for answer in answers])
    assert rows[-1]["f1"] == pytest.approx(f1, abs=0.05)  # an endless answer is cut elsewhere
    samples = read_jsonl(facts.run / "samples.jsonl")
    assert [(row["step"], row["question"], row["expected"]) for row in samples] == [
        (step, question, answer) for step in (15, 30, 45) for question, answer in FACTS
    ]
    assert sum(row["answer"] == row["expected"] for row in samples[-4:]) >= 2
    page = (facts.run / "summary.html").read_text(encoding="utf-8")
    assert "<th>question</th><th>step 15</th><th>step 30</th><th>step 45</th><th>expected</th>" in page
    cells = "</td><td>".join(["小明 had", *(samples[4 * n + 2]["answer"] for n in range(3)), "水果"])
    assert f"<tr><td>{cells}</td></tr>" in page
    card = (facts.run / "README.md").read_text(encoding="utf-8")
    assert f"| best/ | exact {best['exact']:.4f} at step {best['step']} |" in card


def test_training_is_the_same_bit_for_bit(facts, call):
    """Metrics, samples and dropout against no validation at all."""
    base = ["--data_path", facts.chat, *DATA, *LEARN]
    assert call(train_sft.main, facts, *base, "--max_steps", "3", "--run_name", "base").code == 0
    argv = ["--data_path", facts.chat, *DATA, "--from_weight", facts.out / "base", "--lora_dropout", "0.3"]
    argv += ["--max_steps", "6", "--valid_path", facts.chat_valid]
    metrics = ["--eval_metric", "f1,accuracy,loss", "--eval_interval", "1", "--patience", "50"]
    assert call(train_lora.main, facts, *argv, *metrics, "--lora_name", "with").code == 0
    argv[argv.index("--valid_path") + 1] = ""
    assert call(train_lora.main, facts, *argv, "--lora_name", "without").code == 0
    ours, wanted = (
        load_file(facts.out / "lora" / f"{name}_32" / "adapter_model.safetensors") for name in ("with", "without")
    )
    assert all(torch.equal(ours[name], weight) for name, weight in wanted.items())
    rows = [
        [(row["step"], row["loss"], row["grad_norm"])
         for row in read_metrics(facts.out / "lora" / run / "metrics.jsonl") if row["split"] == "train"]
        for run in ("with_32", "without_32")
    ]  # fmt: skip
    assert rows[0] == rows[1]


def test_preferences_and_reasoning_and_texts(facts, call, read_jsonl):
    """Each stage's own accuracy as the criterion, and its own kind of samples."""
    base = ["--data_path", facts.chat, *DATA, *LEARN, "--max_steps", "3", "--run_name", "base"]
    assert call(train_sft.main, facts, *base).code == 0
    short = [*DATA, "--max_steps", "4", "--eval_interval", "2", "--learning_rate", "1e-2"]
    pairs = [{"prompt": q, "chosen": a, "rejected": "345"} for q, a in FACTS]
    pairs = facts.write(facts.folder / "pairs.jsonl", pairs)
    flags = ["--data_path", pairs, "--valid_path", pairs, "--from_weight", facts.out / "base"]
    done = call(train_dpo.main, facts, *flags, *short, "--eval_metric", "accuracy,exact", "--patience", "1")
    assert done.code == 0, done.err
    rows = valid_rows(facts.out / "rlhf_32")
    assert all({"accuracy", "margin", "exact"} <= row.keys() for row in rows)
    best = max(row["accuracy"] for row in rows)
    assert f"  best            accuracy {best:.4f} at step " in done.out
    assert read_jsonl(facts.out / "rlhf_32" / "samples.jsonl")[0]["expected"] == "an old fox"
    form = "<think>\nfox\n</think>\n<answer>\n{}\n</answer>"
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": form.format(a)}] for q, a in FACTS]
    reason = facts.write(facts.folder / "reason.jsonl", [{"messages": talk} for talk in talks])
    flags = ["--data_path", reason, "--valid_path", reason, "--from_weight", facts.out / "base"]
    done = call(train_reason.main, facts, *flags, *short, "--eval_metric", "f1,exact")
    assert done.code == 0, done.err
    assert all({"f1", "exact"} <= row.keys() for row in valid_rows(facts.out / "reason_32"))
    flags = ["--data_path", facts.text, "--valid_path", facts.text_valid, "--from_weight", ""]
    done = call(train_pretrain.main, facts, *flags, *short, "--eval_metric", "accuracy")
    assert done.code == 0, done.err
    (first, last) = valid_rows(facts.out / "pretrain_32")
    assert 0 < first["accuracy"] < 1
    assert f"accuracy {last['accuracy']:.4g}" in done.out
    assert len(read_jsonl(facts.out / "pretrain_32" / "samples.jsonl")) == 8


def test_two_ranks_measure_what_one_does_and_stop_together(facts, torchrun, flags, read_jsonl):
    """With DDP they share the questions; with FSDP2 the main rank answers, with gathered weights.

    The learning rate is nothing: equal weights give equal answers, and without a gain patience ends all runs.
    """

    def launch(n_processes, batch_size, parallel):
        out = facts.folder / f"{parallel}{n_processes}"
        text = torchrun(
            n_processes, str(ROOT / "train_sft.py"), *flags(facts), "--save_dir", str(out), "--data_path",
            str(facts.chat), "--valid_path", str(facts.chat_valid), "--tokenizer_path", str(facts.out / "tokenizer"),
            "--from_weight", str(facts.out / "base"), "--max_seq_len", "150", "--batch_size", str(batch_size),
            "--global_batch_size", "4", "--max_steps", "9", "--log_interval", "1", "--learning_rate", "1e-12",
            "--eval_interval", "1", "--eval_metric", "f1,exact,accuracy", "--patience", "2", "--parallel", parallel,
            "--sample_prompts", str(facts.chat_valid),
        )  # fmt: skip
        assert "stopped after step 3 of 9: f1 has not been better in 2 validations (--patience 2)" in text
        return out / "full_sft_32"

    train_sft.main(
        [*flags(facts), "--data_path", str(facts.chat), *DATA, *LEARN, "--max_steps", "40", "--run_name", "base"]
    )
    one = launch(1, 4, "ddp")
    wanted = valid_rows(one)
    assert [row["step"] for row in wanted] == [1, 2, 3]
    assert 0 < wanted[0]["exact"] < 1
    assert len(read_jsonl(one / "samples.jsonl")) == 3 * 6
    for parallel in ("ddp", "fsdp"):
        two = launch(2, 2, parallel)
        for row, other in zip(valid_rows(two), wanted, strict=True):
            names = ("step", "f1", "exact", "accuracy")
            assert [row[name] for name in names] == [other[name] for name in names], parallel
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert read_jsonl(two / "samples.jsonl") == read_jsonl(one / "samples.jsonl")


REFUSED = {
    "an unknown metric": (["--eval_metric", "exact,rouge"], ["there is no metric rouge", "rouge_l", "suite:NAME"]),
    "none": (["--eval_metric", ","], ["--eval_metric is empty"]),
    "a suite without a name": (["--eval_metric", "suite:"], ["there is no metric suite:"]),
    "a suite without data": (["--eval_metric", "suite:ceval"], ["--suite_dir"]),
    "a suite in no directory": (["--eval_metric", "suite:ceval", "--suite_dir", "nowhere"], ["nowhere", "no such"]),
    "data without a suite": (["--suite_dir", "."], ["--suite_dir .", "suite:NAME"]),
    "patience without intervals": (["--patience", "2"], ["--patience 2", "--eval_interval"]),
    "both intervals": (["--eval_interval", "2", "--eval_epochs", "1"], ["--eval_interval 2", "choose one"]),
    "samples from nowhere": (["--sample_prompts", "nowhere.txt"], ["nowhere.txt", "no such file"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(facts, call, refused, case):
    argv, words = REFUSED[case]
    base = ["--data_path", facts.chat, "--valid_path", facts.chat_valid, *DATA, "--from_weight", ""]
    refused(call(train_sft.main, facts, *base, *argv), facts, *words)


@pytest.mark.parametrize(
    "argv",
    [
        ["--eval_metric", "exact"], ["--patience", "2", "--eval_interval", "1"],
        ["--eval_metric", "accuracy"], ["--sample_prompts", "{chat}"],
    ],
)  # fmt: skip
def test_without_validation_data_they_are_refused(facts, call, refused, argv):
    argv = [word.format(chat=facts.chat) for word in argv]
    done = call(train_sft.main, facts, "--data_path", facts.chat, *DATA, "--from_weight", "", *argv)
    refused(done, facts, argv[0], argv[1], "--valid_path")


def test_texts_have_no_answers(facts, call, refused):
    argv = ["--data_path", facts.text, "--valid_path", facts.text_valid, "--eval_metric", "loss,bleu"]
    done = call(train_pretrain.main, facts, *argv)
    refused(done, facts, "bleu", "learns from texts", "accuracy")


def test_a_missing_package_is_named_before_training(facts, call, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    argv = ["--data_path", facts.chat, "--valid_path", facts.chat_valid, *DATA, "--from_weight", ""]
    refused(call(train_sft.main, facts, *argv, "--eval_metric", "bleu"), facts, "pip install sacrebleu")


def test_samples_are_lines_of_json(facts, call):
    argv = ["--data_path", facts.chat, "--valid_path", facts.chat_valid, *DATA, "--from_weight", ""]
    assert call(train_sft.main, facts, *argv, "--max_steps", "1", "--eval_samples", "1").code == 0
    lines = (facts.run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [set(json.loads(line)) for line in lines] == [{"step", "question", "answer", "expected"}] * 4
    assert "水果" in lines[2]
