"""eval_model.py for preference and reasoning models: pairs, answers with and without thinking, the chat that thinks."""

import builtins
import json
from types import SimpleNamespace

import pytest
import torch

import eval_model
from minillm.config import ModelConfig
from minillm.data.records import read_records
from minillm.evaluation import evaluate_reasoning, preference_accuracy
from minillm.hub.huggingface import load_model, save_model
from minillm.inference import Completion
from minillm.inference.chat import model as chat_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

GREEDY = ("--temperature", "0", "--max_new_tokens", "12")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    """A save_dir with a model of each chat stage."""
    folder = tmp_path_factory.mktemp("out")
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for seed, stage in enumerate(("pretrain", "full_sft", "rlhf", "reason")):
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**shape, max_position_embeddings=128, initializer_range=0.3))
        save_model(model, folder / f"{stage}_32", tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(out, monkeypatch, capsys, tmp_path):
    """Run the script; return its exit code, its output, its error output, and what it wrote."""

    def run(*argv, questions=None):
        monkeypatch.setattr("sys.stdin.isatty", lambda: questions is not None, raising=False)
        waiting = iter(questions or ())

        def typed(prompt=""):
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(builtins, "input", typed)
        output = tmp_path / "results.json"
        try:
            eval_model.main(["--save_dir", str(out), "--device", "cpu", "--output", str(output), *map(str, argv)])
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err, json.loads(output.read_text(encoding="utf-8")) if code == 0 else None

    return run


def form(answer, thinking="so"):
    return f"<think>\n{thinking}\n</think>\n<answer>\n{answer}\n</answer>"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def problem(question, expected, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
    return {"conversations": turns} | more


@pytest.fixture
def pairs(tmp_path):
    records = [{"prompt": "a", "chosen": "b", "rejected": "the cat"}, {"prompt": "b", "chosen": "cc", "rejected": "d"}]
    return write(tmp_path / "pairs.jsonl", *records)


@pytest.mark.parametrize(("mode", "stage"), [(1, "full_sft"), (2, "rlhf"), (3, "reason")])
def test_pairs_in_every_chat_mode(run, out, tokenizer, pairs, mode, stage):
    code, shown, err, results = run("--model_mode", mode, "--pairs_file", pairs)
    assert code == 0, err
    assert results["weights"].endswith(f"{stage}_32")
    expected = preference_accuracy(load_model(out / f"{stage}_32").eval(), tokenizer, read_records(pairs))
    assert results["preference"] == expected.as_dict()
    assert expected.table() in shown
    assert "chat skipped" not in shown


def test_a_preference_model_chats_and_answers_like_any_other(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("hello\n")
    code, _, err, results = run("--model_mode", 2, "--prompts", tmp_path / "prompts.txt", *GREEDY)
    assert code == 0, err
    assert set(results["prompts"][0]) == {"prompt", "answer", "finish_reason", "n_tokens"}
    code, shown, _, _ = run("--model_mode", 2, *GREEDY, questions=["hello"])
    assert code == 0
    assert "tokens/s," in shown


def test_tasks_with_thinking_and_without(run, out, tokenizer, tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", problem("1+1", form(2), task="sums", final="2"), problem("b", "b"))
    code, shown, err, results = run("--model_mode", 3, "--task_file", tasks, *GREEDY)
    assert code == 0, err
    model, records = load_model(out / "reason_32").eval(), list(read_records(tasks))
    assert set(results["reasoning"]) == {"thinking", "direct"}
    for name, think in (("thinking", True), ("direct", False)):
        score = evaluate_reasoning(model, tokenizer, records, max_new_tokens=12, batch_size=2, think=think)
        assert results["reasoning"][name] == json.loads(json.dumps(score.as_dict()))
        assert score.table() in shown
    assert results["reasoning"]["thinking"] != results["reasoning"]["direct"]
    assert "exact_match" not in results


def test_several_samples_add_the_majority_and_pass_at_k(run, tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", problem("1+1", form(2)), problem("b", "b"))
    argv = ("--model_mode", 3, "--task_file", tasks, "--n_samples", 3, "--max_new_tokens", 8, "--temperature", 1)
    found = [run(*argv, "--seed", seed) for seed in (1, 1, 2)]
    code, shown, err, results = found[0]
    assert code == 0, err
    sampled = results["reasoning"]["sampled"]
    assert sampled["n_samples"] == 3
    assert set(sampled["pass_at"]) == {"1", "2", "3"}
    assert "pass@3" in shown
    assert "pass_at" not in results["reasoning"]["thinking"]  # which stays greedy
    texts = [done[3]["reasoning"]["sampled"]["answers"] for done in found]
    assert texts[0] == texts[1] != texts[2]


@pytest.fixture
def say(monkeypatch):
    """Let the model answer every prompt, and every turn of a chat, with one text."""

    def say(text):
        def answer(model, prompts, **options):
            return [Completion(ids=[1, 2], text=text, finish_reason="eos") for _ in prompts]

        def stream(model, prompt, **options):
            yield from text
            return Completion(ids=[1, 2], text=text, finish_reason="eos")

        monkeypatch.setattr(eval_model, "complete", answer)
        monkeypatch.setattr("minillm.inference.chat.session.stream", stream)

    return say


@pytest.mark.parametrize(
    ("thinking", "shown_as"), [("dim", "\x1b[2mhm\x1b[0m\n8\n"), ("hide", "> q\n8\n"), ("plain", "> q\nhm\n8\n")]
)
def test_prompts_are_answered_in_parts(run, say, tmp_path, monkeypatch, thinking, shown_as):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    (tmp_path / "prompts.txt").write_text("q\n")
    say(form(8, "hm"))
    argv = ("--model_mode", 3, "--prompts", tmp_path / "prompts.txt", "--thinking", thinking)
    code, shown, err, results = run(*argv)
    assert code == 0, err
    assert shown_as in shown
    assert "<" not in shown.split("> q\n")[1].split("[")[0]
    (answer,) = results["prompts"]
    assert (answer["answer"], answer["thinking"], answer["well_formed"]) == ("8", "hm", True)
    assert answer["text"] == form(8, "hm")
    say("<think>hm")
    (answer,) = run(*argv)[3]["prompts"]
    assert (answer["thinking"], answer["well_formed"]) == ("hm", False)


def test_what_the_prompt_has_opened_belongs_to_the_answer(run, say, tmp_path, monkeypatch):
    """Some templates begin the thinking themselves."""
    monkeypatch.setattr(chat_model, "chat_format", lambda tokenizer: SimpleNamespace(opens_with="<think>\n"))
    (tmp_path / "prompts.txt").write_text("q\n")
    say(form(8, "hm").removeprefix("<think>\n"))
    _, shown, _, results = run("--model_mode", 3, "--prompts", tmp_path / "prompts.txt", "--thinking", "hide")
    assert "> q\n8\n" in shown
    (answer,) = results["prompts"]
    assert (answer["text"], answer["thinking"], answer["well_formed"]) == (form(8, "hm"), "hm", True)


def test_the_chat_hides_the_thinking_and_forgets_it(run, say, monkeypatch):
    seen, encode = [], chat_model.encode_chat

    def spy(tokenizer, messages, **options):
        seen.append([message["content"] for message in messages])
        return encode(tokenizer, messages, **options)

    monkeypatch.setattr(chat_model, "encode_chat", spy)
    say(form(8, "hm"))
    code, shown, err, _ = run("--model_mode", 3, "--thinking", "hide", questions=["one", "two"])
    assert code == 0, err
    assert "hm" not in shown
    assert shown.count("8\n[2 tokens") == 2
    assert seen[1] == ["one", form(8, ""), "two"]


def test_refusals_are_one_line_and_exit_code_2(run, pairs, tmp_path):
    tasks = write(tmp_path / "tasks.jsonl", problem("a", "b"))
    number = write(tmp_path / "number.jsonl", problem("a", "b", final=8))
    for argv, words in [
        (["--pairs_file", tmp_path / "no.jsonl"], ["--pairs_file", "no.jsonl: no such file"]),
        (["--model_mode", 0, "--pairs_file", pairs], ["--pairs_file needs a chat model"]),
        (["--pairs_file", tasks], ["record 0 (line 1) is a chat record"]),
        (["--model_mode", 3, "--task_file", number], ["record 0: final is 8"]),
        (["--model_mode", 3, "--task_file", pairs], ["record 0", "conversations"]),
        (["--model_mode", 3, "--task_file", tasks, "--text_metrics"], ["--text_metrics", "mode 3"]),
        (["--thinking", "hide"], ["--thinking hide", "--model_mode 3"]),
        (["--model_mode", 3, "--n_samples", 0, "--task_file", tasks], ["--n_samples 0: must be at least 1"]),
        (["--model_mode", 3, "--n_samples", 2], ["--n_samples 2", "--task_file"]),
        (["--n_samples", 2, "--task_file", tasks], ["--n_samples 2", "--model_mode 3"]),
        (["--model_mode", 3, "--n_samples", 2, "--task_file", tasks, *GREEDY], ["--n_samples 2", "--temperature 0"]),
    ]:
        code, _, err, _ = run(*argv)
        assert code == 2, argv
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert all(word in err for word in words), err
