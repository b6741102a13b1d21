"""Rejection sampling: what is kept, what is counted, and the command line."""

import json

import pytest
import torch

from minillm.config import ModelConfig
from minillm.data.reasoning import parse_reasoning
from minillm.data.records import read_records
from minillm.errors import UserError
from minillm.evaluation.sample_answers import main, read_problems, sample_answers, write_whole
from minillm.hub.huggingface import save_model
from minillm.inference import Completion
from minillm.model import Transformer
from minillm.tokenizer import train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    """A save_dir with a reasoning model of random weights."""
    folder, shape = tmp_path_factory.mktemp("out"), {"hidden_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=267, num_attention_heads=4, max_position_embeddings=128, **shape)
    save_model(Transformer(config), folder / "reason_32", tokenizer=tokenizer)
    return folder


def form(answer, thinking="so"):
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


def problem(question, expected, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return {"conversations": turns} | more


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def say(monkeypatch, tokenizer):
    """Let the model answer by rule: a text of the question and of a number that the seed of the sampling decides."""

    def say(rule):
        def answer(model, prompts, *, generator, **options):
            said = []
            for ids in prompts:
                question = tokenizer.decode(ids).split("user\n")[-1].split("<|im_end|>")[0]
                text = rule(question, int(torch.randint(10, (), generator=generator)))
                said.append(Completion(ids=[0], text=text, finish_reason="eos"))
            return said

        monkeypatch.setattr("minillm.evaluation.reasoning.complete", answer)

    return say


@pytest.fixture
def run(out, capsys):
    """Run the command; return its exit code, its output and its error output."""

    def run(*argv, save_dir=out):
        try:
            main(["--save_dir", str(save_dir), "--device", "cpu", *map(str, argv)])
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


class Model:
    """As much of a model as prompts are checked against."""

    class config:
        max_position_embeddings = 300


def test_what_is_kept_and_counted(tokenizer, tmp_path, monkeypatch):
    said = {
        "a": [form(8, "one way"), form(9), form(8, "one way") + "\n", "8", form("8.0", "another"), form(8, "a third")],
        "b": ["9"] * 6,
        "c": [form(1)] * 6,
    }
    turns = {question: iter(texts) for question, texts in said.items()}

    def answer(model, prompts, *, tokenizer, **options):
        questions = [tokenizer.decode(ids).split("user\n")[-1][0] for ids in prompts]
        return [Completion(ids=[0], text=next(turns[question]), finish_reason="eos") for question in questions]

    monkeypatch.setattr("minillm.evaluation.reasoning.complete", answer)
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    records = [problem("a", form(8), source="s"), problem("b", "9", final="8"), problem("c", "?", final="1", task="t")]
    records[2]["conversations"] = earlier + records[2]["conversations"]
    records[2]["tools"] = [{"type": "function", "function": {"name": "f"}}]
    problems = read_problems(write(tmp_path / "p.jsonl", *records))
    rows, counts = sample_answers(Model, tokenizer, problems, n_samples=6, keep=2, temperature=1.0, max_new_tokens=9,
                                  batch_size=4)  # fmt: skip
    assert [row["conversations"][-1] for row in rows] == [
        {"role": "assistant", "content": text} for text in (form(8, "one way"), form("8.0", "another"), form(1))
    ]
    assert rows[2]["conversations"][:-1] == [*earlier, {"role": "user", "content": "c"}]
    found = {"n_samples": 6, "n_correct": 5, "n_well_formed": 5}
    assert {key: value for key, value in rows[0].items() if key != "conversations"} == (
        found | {"source": "s", "final": "8"}
    )
    assert (rows[2]["task"], rows[2]["final"], rows[2]["n_correct"]) == ("t", "1", 6)
    assert rows[2]["tools"] == records[2]["tools"]
    assert counts == {
        "problems": 3, "solved": 2, "answers": 18, "well_formed": 11, "correct": 11, "duplicates": 6, "kept": 3
    }  # fmt: skip


@pytest.mark.parametrize(("keep", "n_kept"), [(0, 5), (1, 1), (3, 3), (9, 5)])
def test_at_most_so_many_are_kept_per_problem(run, say, tmp_path, keep, n_kept):
    say(lambda question, number: form(8, f"way {number // 2}"))
    data, output = write(tmp_path / "p.jsonl", problem("a", "8", final="8")), tmp_path / "kept.jsonl"
    code, shown, err = run("--data_path", data, "--output", output, "--n_samples", 60, "--keep", keep)
    assert code == 0, err
    assert len(list(read_records(output))) == n_kept
    assert f"kept {n_kept}" in " ".join(shown.split())


def by_chance(question, number):
    return form(number, f"{question} {number}") if number % 3 else str(number)


def test_the_file_is_training_data_and_the_seed_decides_it(run, say, tmp_path):
    say(by_chance)
    data = write(tmp_path / "p.jsonl", *(problem(f"q{n}", form(n % 10), task="t") for n in range(20)))
    files = []
    for seed in (1, 1, 2):
        files.append(tmp_path / f"kept{len(files)}.jsonl")
        argv = ("--data_path", data, "--output", files[-1], "--seed", seed, "--n_samples", 6, "--batch_size", 5)
        code, shown, err = run(*argv)
        assert (code, err) == (0, "")
    first, again, other = (path.read_bytes() for path in files)
    assert first == again != other
    assert f"wrote {files[-1]}" in shown
    rows = list(read_records(files[0], strict=True))
    assert rows
    for row in rows:
        assert parse_reasoning(row.messages[-1]["content"]).answer == row.extra["final"]
        assert row.extra["task"] == "t"
    counts = {line[:20].strip(): line[20:].strip() for line in shown.splitlines() if line[:1].isalpha()}
    assert counts["problems"] == "20"
    assert counts["answers"] == "120"
    assert counts["mean accuracy"] == f"{int(counts['correct']) / 120:.1%}"
    tenths = [f"[{-(-n // 5) * 5} of 120 answers]" for n in range(12, 121, 12)]  # after whole batches
    assert [line for line in shown.splitlines() if line[:1] == "["] == tenths
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_real_model_is_asked(run, tmp_path):
    """Random weights solve nothing: the file that was there stays as it is."""
    data, output = write(tmp_path / "p.jsonl", problem("a", form(8))), tmp_path / "kept.jsonl"
    output.write_text("old\n")
    code, shown, err = run("--data_path", data, "--output", output, "--max_new_tokens", 5)
    assert code == 2
    assert err.startswith("error: none of 8 answers")
    assert err.count("\n") == 1
    assert f"{output} is not written" in err
    assert "solved 0" in " ".join(shown.split())
    assert output.read_text() == "old\n"


def test_refusals_are_one_line_and_exit_code_2(run, tmp_path):
    good = write(tmp_path / "good.jsonl", problem("a", form(8)))
    plain = write(tmp_path / "plain.jsonl", problem("a", form(8)), problem("b", "8"))
    number = write(tmp_path / "number.jsonl", problem("a", form(8), final=8))
    texts = write(tmp_path / "texts.jsonl", {"text": "a"})
    long = write(tmp_path / "long.jsonl", problem("a" * 200, form(8)))
    output = ["--output", tmp_path / "kept.jsonl"]
    for argv, words in [
        (["--data_path", plain, *output], ["plain.jsonl, line 2: no right answer", "no <think>", "add it as final"]),
        (["--data_path", number, *output], ["line 1", "final is 8"]),
        (["--data_path", texts, *output], ["texts.jsonl, line 1", "conversations"]),
        (["--data_path", long, *output], ["record 0", "reads 128"]),
        (["--data_path", tmp_path / "no.jsonl", *output], ["--data_path", "no.jsonl: no such file"]),
        (["--data_path", good, "--output", tmp_path / "no" / "kept.jsonl"], ["--output", "cannot be written"]),
        (["--data_path", good, "--output", tmp_path / "kept.json"], ["--output", ".jsonl"]),
        (["--data_path", good, "--output", good], ["--output", "another .jsonl file than the problems'"]),
        (["--data_path", good, *output, "--n_samples", 0], ["--n_samples 0: must be at least 1"]),
        (["--data_path", good, *output, "--temperature", 0], ["--n_samples 8 at --temperature 0.0", "equal"]),
        (["--data_path", good, *output, "--temperature", -1], ["temperature -1.0"]),
        (["--data_path", good, *output, "--top_p", 2], ["top_p 2.0"]),
        (["--data_path", good, *output, "--keep", -1], ["--keep -1: must be at least 0"]),
        (["--data_path", good, *output, "--from_weight", ""], ["--from_weight is empty"]),
        (["--data_path", good, *output, "--from_weight", "rlhf"], ["no weights 'rlhf'", "reason_32"]),
    ]:
        code, _, err = run(*argv)
        assert code == 2, argv
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert all(word in err for word in words), err
    assert not (tmp_path / "kept.jsonl").exists()


def test_one_greedy_answer_is_allowed(run, say, tmp_path):
    say(lambda question, number: form(8))
    argv = ("--data_path", write(tmp_path / "p.jsonl", problem("a", form(8))), "--output", tmp_path / "kept.jsonl")
    code, shown, err = run(*argv, "--n_samples", 1, "--temperature", 0)
    assert code == 0, err
    assert "mean accuracy 100.0%" in " ".join(shown.split())


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "x.jsonl"
    target.write_text("old")

    def full(self, text, **options):
        with open(self, "w") as file:
            file.write(text[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(UserError, match=r"x\.jsonl: No space left on device"):
            write_whole(target, "new text")
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]
    assert target.read_text() == "old"
    write_whole(target, "new text")
    assert target.read_text() == "new text"
