"""eval_model.py from its command line: answers, measures, chat, and clear refusals."""

import builtins
import io
import json
import shutil

import pytest
import torch

import eval_model
from minillm.cli.eval_arguments import EvalArguments
from minillm.config import ModelConfig
from minillm.evaluation import measure
from minillm.hub.huggingface import save_model
from minillm.inference import generate
from minillm.inference.chat import model as chat_model
from minillm.model import Transformer
from minillm.tokenizer import encode_chat, train_bpe
from tests.evaluation.suite_files import make_originals


def tiny_model(seed, **overrides):
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**(shape | overrides)))


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    """A save_dir with a pretrained and a fine-tuned model."""
    folder = tmp_path_factory.mktemp("out")
    tokenizer.save(folder / "tokenizer")
    for seed, stage in enumerate(("pretrain", "full_sft")):
        save_model(tiny_model(seed), folder / f"{stage}_32", tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(out, monkeypatch, capsys):
    """Run the script; return its exit code, its output and its error output."""

    def call(*argv, save_dir=out, questions=None):
        monkeypatch.setattr("sys.stdin.isatty", lambda: questions is not None, raising=False)
        waiting = iter(questions or ())

        def answer_input(prompt=""):
            print(prompt, end="")
            line = next(waiting, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer_input)
        try:
            eval_model.main(["--save_dir", str(save_dir), "--device", "cpu", *map(str, argv)])
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


GREEDY = ("--temperature", "0", "--max_new_tokens", "12")


def write(path, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_prompts_of_a_chat_model(run, out, tokenizer, tmp_path):
    file = write(tmp_path / "prompts.txt", "hello", "", "你好 there")
    code, shown, _ = run("--prompts", file, "--output", tmp_path / "out.json", "--batch_size", 1, *GREEDY)
    assert code == 0
    assert "tokens/s" in shown
    assert "> 你好 there" in shown
    results = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in results["prompts"]] == ["hello", "你好 there"]
    ids, _ = encode_chat(tokenizer, [{"role": "user", "content": "hello"}], add_generation_prompt=True)
    eos = [tokenizer.im_end_id, tokenizer.eos_token_id]
    expected = generate(tiny_model(1), [ids], max_new_tokens=12, temperature=0, eos_token_id=eos)[0]
    assert results["prompts"][0]["n_tokens"] == len(expected)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert text.startswith(results["prompts"][0]["answer"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "prompts.txt"]  # no leftovers


def test_prompts_of_a_pretrained_model_and_all_records(run, tmp_path):
    file = write(
        tmp_path / "prompts.jsonl",
        {"prompt": "a"},
        {"text": "b"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "left out"}]},
    )
    for mode in (0, 1):
        code, shown, _ = run("--model_mode", mode, "--prompts", file, *GREEDY)
        assert code == 0
        assert all(f"> {text}\n" in shown for text in "abc")
        assert "left out" not in shown


def test_prompts_of_every_layout(run, tmp_path, prompts_seen):
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbfq\r\nq")
    records = [
        {"instruction": "q", "input": "", "output": "left out", "system": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "left out"}]},
        {"prompt": "q", "completion": "left out"},
        {"question": "q"},
    ]
    array = tmp_path / "a.json"
    array.write_text(json.dumps(records))
    table = tmp_path / "a.csv"
    table.write_text("what,n\nq,1\n")
    for argv, expected in (
        ([marked], [["q"], ["q"]]),
        ([array], [["s", "q"], ["q"], ["q"], ["q"]]),
        ([table, "--columns", "prompt=what"], [["q"]]),
    ):
        prompts_seen.clear()
        code, shown, err = run("--prompts", *argv, *GREEDY)
        assert code == 0, err
        assert prompts_seen == expected
        assert shown.count("> q\n") == len(expected)


def test_prompts_with_tools(run, tmp_path, prompts_seen):
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = write(tmp_path / "prompts.jsonl", {"prompt": "q", "tools": [{"name": "f"}]}, {"prompt": "r"})
    code, _, err = run("--prompts", file, "--output", tmp_path / "out.json", *GREEDY)
    assert code == 0, err
    assert prompts_seen.tools == [tools, None]
    answers = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["prompts"]
    assert [(answer["prompt"], answer.get("tools")) for answer in answers] == [("q", tools), ("r", None)]
    code, _, err = run("--model_mode", 0, "--prompts", file, *GREEDY)
    assert code == 2
    assert "--model_mode 0 completes texts, which have no tools" in err


def test_measures_read_every_layout(run, tmp_path):
    (tmp_path / "valid.csv").write_text("body,kind\nthe cat,facts\n1+2=3,sums\n")
    (tmp_path / "tasks.tsv").write_text("ask\treply\ttask\n1+1=\t2\taddition\n")
    sides = [{"from": "gpt", "value": value} for value in ("two", "three")]
    pair = {"conversations": [{"from": "human", "value": "1+1="}], "chosen": sides[0], "rejected": sides[1]}
    (tmp_path / "pairs.json").write_text(json.dumps([pair] * 3))
    output = tmp_path / "out.json"
    for argv, name, check in (
        (["--perplexity", tmp_path / "*.csv", "--columns", "text=body"], "perplexity",
         lambda r: len(r["by_kind"]) == 2),
        (["--task_file", tmp_path / "tasks.tsv", "--columns", "question=ask,answer=reply"], "exact_match",
         lambda r: set(r["tasks"]) == {"addition"}),
        (["--pairs_file", tmp_path / "pairs.json"], "preference", lambda r: r["n"] == 3),
    ):  # fmt: skip
        code, _, err = run(*argv, "--output", output, *GREEDY)
        assert code == 0, err
        assert check(json.loads(output.read_text())[name])


def test_sampling_is_seeded(run, tmp_path):
    file = write(tmp_path / "prompts.txt", "hello")
    texts = []
    for seed in (1, 1, 2):
        output = tmp_path / "out.json"
        run("--prompts", file, "--output", output, "--seed", seed, "--max_new_tokens", 20)
        texts.append(json.loads(output.read_text(encoding="utf-8"))["prompts"])
    assert texts[0] == texts[1] != texts[2]


def test_perplexity_and_tasks_in_one_call(run, tmp_path):
    valid = write(
        tmp_path / "valid.jsonl",
        {"text": "the cat", "kind": "facts", "log_prob": -3.0},
        {"text": "1+2=3", "kind": "sums", "log_prob": -2.0},
    )
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    tasks = write(tmp_path / "tasks.jsonl", {"conversations": turns, "task": "addition", "group": "held out"})
    output = tmp_path / "out.json"
    code, shown, _ = run("--perplexity", valid, "--task_file", tasks, "--output", output, *GREEDY)
    assert code == 0
    assert "floor" in shown
    assert "held out" in shown
    results = json.loads(output.read_text(encoding="utf-8"))
    assert set(results["perplexity"]["by_kind"]) == {"facts", "sums"}
    assert results["perplexity"]["gap"] > 0
    assert results["exact_match"]["n"] == 1
    assert results["weights"].endswith("full_sft_32")


def test_answers_beside_their_references(run, tmp_path):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2 of them"}]
    tasks = write(tmp_path / "tasks.jsonl", {"conversations": turns})
    output = tmp_path / "out.json"
    code, shown, _ = run("--task_file", tasks, "--text_metrics", "--output", output, *GREEDY)
    assert code == 0
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["answer_loss"]["n_targets"] == 10  # bytes, and the end of the turn
    assert f"{results['answer_loss']['nats_per_token']:.4f} nats/token over 10 tokens" in shown
    assert 0 <= results["rouge"]["rouge_l"] <= 1
    assert results["bleu"]["signature"] in shown


def test_suites_with_an_untrained_model_and_resume(run, out, tmp_path, monkeypatch):
    folder, output = tmp_path / "eval", tmp_path / "scores.json"
    make_originals(folder)
    call = ("--suite", "zh", "--suite_dir", folder, "--output", output, "--max_new_tokens", 4)
    code, shown, err = run(*call, "--suite_random", "--suite_limit", 2)
    assert code == 0, err
    assert "no files" in shown
    assert "gaokao_mcq, tal_math_zh" in shown
    results = json.loads(output.read_text(encoding="utf-8"))
    assert {name: score["n"] for name, score in results["suites"].items()} == {"ceval": 2, "cmmlu": 1, "cmath": 2}
    ceval = results["suites"]["ceval"]
    assert ceval["chance"] == 0.25
    assert ceval["random"]["n"] == 2
    assert all(len(question["log_likelihoods"]) == 4 for question in ceval["questions"])
    assert results["weights"].endswith("full_sft_32")
    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| C-Eval | 2 |" in table
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"wrote {output.with_suffix('.png')}\n" in shown
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"eval", "scores.json", "scores.md", "scores.png"}  # no leftovers

    asked = []
    measure_suite = measure.run_suite
    monkeypatch.setattr(
        measure, "run_suite", lambda name, *a, **kw: asked.append(name) or measure_suite(name, *a, **kw)
    )
    again = (*call, "--suite_random", "--suite_limit", 2, "--suite_resume")
    assert run(*again)[0] == 0
    assert asked == []
    assert json.loads(output.read_text(encoding="utf-8"))["suites"] == results["suites"]
    (folder / "cmmlu/test/agronomy.csv").write_text(",Question,A,B,C,D,Answer\n0,new,1,2,3,4,A\n")
    assert run(*again)[0] == 0
    assert asked == ["cmmlu", "cmmlu"]  # the model and the untrained one, on a file that has changed
    asked.clear()
    code, printed, _ = run(*call, "--suite_resume")  # other settings: all questions, nothing untrained
    assert (code, "other files: ceval, cmmlu, cmath" in printed) == (0, True)
    assert asked == ["ceval", "cmmlu", "cmath"]


def test_an_interrupted_suite_keeps_the_finished_ones(run, tmp_path, monkeypatch):
    folder, output = tmp_path / "eval", tmp_path / "scores.json"
    make_originals(folder)
    measure_suite = measure.run_suite

    def fails(name, *args, **options):
        if name == "mmlu":
            raise KeyboardInterrupt
        return measure_suite(name, *args, **options)

    monkeypatch.setattr(measure, "run_suite", fails)
    assert run("--suite", "piqa,mmlu", "--suite_dir", folder, "--output", output)[0] == 130
    assert list(json.loads(output.read_text(encoding="utf-8"))["suites"]) == ["piqa"]


def test_resume_keeps_suites_that_are_not_asked_again(run, out, tmp_path):
    folder, output = tmp_path / "eval", tmp_path / "scores.json"
    make_originals(folder)
    call = ("--suite_dir", folder, "--output", output)
    assert run("--suite", "piqa,mmlu", *call)[0] == 0
    assert run("--suite", "arc_easy", *call, "--suite_resume")[0] == 0
    assert list(json.loads(output.read_text(encoding="utf-8"))["suites"]) == ["mmlu", "arc_easy", "piqa"]
    assert "| PIQA |" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert run("--suite", "arc_easy", *call, "--suite_resume", "--dtype", "bfloat16")[0] == 0  # another model
    assert list(json.loads(output.read_text(encoding="utf-8"))["suites"]) == ["arc_easy"]
    output.write_text('{"suites": []}')
    code, _, err = run("--suite", "arc_easy", *call, "--suite_resume")
    assert (code, "not a result file" in err) == (2, True)


def test_resume_tells_a_model_from_the_same_one_with_another_adapter(tokenizer):
    """An adapter that was trained again has the same name, and its model's files are the same."""
    model, args = tiny_model(0), EvalArguments(lora_name="cooking")
    before = measure._identity(model, tokenizer, args, "out/full_sft_32")
    assert before == measure._identity(tiny_model(0), tokenizer, args, "out/full_sft_32")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0] += 1e-3
    assert before != measure._identity(model, tokenizer, args, "out/full_sft_32")


def test_wrong_files_end_it_before_anything_is_computed(run, tmp_path, monkeypatch):
    """Also those of the last suite, a style that they do not fit, and too few examples."""
    folder = tmp_path / "eval"
    make_originals(folder)
    monkeypatch.setattr(measure, "run_suite", lambda *_, **__: pytest.fail("measured"))
    call = ("--suite_dir", folder, "--output", tmp_path / "x.json")
    question = {"id": "a", "question": "no blank", "choices": ["1", "2"], "answer": 0}
    for record, suites, words in [
        (question | {"answer": 5}, "mmlu, winogrande", ["line 1", "answer 5 with 2 choices"]),
        (question, "mmlu,winogrande", ["line 1", "needs a question with a blank"]),
        (question, "en", ["line 1", "needs a question with a blank"]),
    ]:
        (folder / "winogrande.jsonl").write_text(json.dumps(record) + "\n")
        code, _, err = run("--suite", suites, *call)
        assert (code, all(word in err for word in words)) == (2, True), err
    code, _, err = run("--suite", "gsm8k,cmath", *call, "--n_shot", 2)
    assert (code, "n_shot 2" in err and "cmath" in err) == (2, True), err
    code, _, err = run("--suite", "mmlu, gaokao_mcq", *call)
    assert (code, "gaokao_mcq.jsonl" in err) == (2, True), err
    code, _, err = run("--suite", "mmlu", "--suite_dir", folder, "--output", tmp_path / "x.md")
    assert (code, "name a .json" in err) == (2, True), err


def test_suites_that_cannot_be_measured(run, tmp_path):
    folder = tmp_path / "eval"
    make_originals(folder)
    (tmp_path / "empty").mkdir()
    for argv, words in [
        (["--suite", "unknown", "--suite_dir", folder], ["'unknown'", "ceval", "hellaswag"]),
        (["--suite", "all", "--suite_dir", tmp_path / "empty"], ["empty", "no files of any suite"]),
        (["--suite", "gaokao_mcq,piqa", "--suite_dir", folder], ["gaokao_mcq.jsonl", "directory (--suite_dir)"]),
        (["--suite", "piqa", "--suite_dir", tmp_path / "none"], ["--suite_dir", "no such directory"]),
        (["--suite", "ceval", "--suite_dir", folder, "--n_shot", 3], ["n_shot 3", "'law'"]),
    ]:
        code, _, err = run(*argv)
        assert code == 2, argv
        assert len(err.strip().splitlines()) == 1, err
        assert all(word in err for word in words), err


def test_without_a_terminal_questions_come_from_standard_input(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    code, shown, _ = run("--prompt", "zero", "--prompt", "nought", *GREEDY)
    assert code == 0
    assert [line for line in shown.splitlines() if line.startswith("> ")] == ["> zero", "> nought"]
    code, shown, _ = run(*GREEDY)
    assert [line for line in shown.splitlines() if line.startswith("> ")] == ["> one", "> two"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, shown, _ = run()
    assert code == 0
    assert "no questions on standard input: give --prompt TEXT or --prompts FILE" in shown


class Seen(list):
    """The texts of each conversation."""

    def __init__(self):
        super().__init__()
        self.tools = []


@pytest.fixture
def prompts_seen(monkeypatch):
    """Record the conversations that the script encodes, and their tools."""
    seen, encode = Seen(), chat_model.encode_chat

    def spy(tokenizer, messages, *, tools, **options):
        seen.append([message["content"] for message in messages])
        seen.tools.append(tools)
        return encode(tokenizer, messages, tools=tools, **options)

    monkeypatch.setattr(chat_model, "encode_chat", spy)
    return seen


def test_chat_remembers_clears_and_ends(run, prompts_seen):
    questions = ["one", "two", "", "three", "/clear", "four", "/exit", "never asked"]
    argv = ("--history_turns", 1, "--max_new_tokens", 3, "--temperature", 0, "--system", "be kind")
    code, shown, _ = run(*argv, questions=questions)
    assert code == 0
    assert shown.count("tokens/s,") == 4
    assert [messages[0] for messages in prompts_seen] == ["be kind"] * 4
    assert [messages[-1] for messages in prompts_seen] == ["one", "two", "three", "four"]
    assert [len(messages) for messages in prompts_seen] == [2, 4, 4, 2]
    assert prompts_seen[2][1] == "two"  # one turn of history, not two


def test_chat_forgets_what_does_not_fit_and_survives_a_long_question(run, prompts_seen):
    questions = ["a" * 30, "b" * 30, "c" * 500, "d"]
    code, shown, err = run("--max_new_tokens", 40, "--temperature", 0, questions=questions)
    assert code == 0
    assert "500" not in shown
    assert "error: " in err
    assert "128 positions" in err
    assert shown.count("tokens/s,") == 3
    assert ["b" * 30] in prompts_seen  # 30 + 30 and an answer do not fit


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_chat_ends_cleanly(run, end):
    code, _, err = run("--max_new_tokens", 3, questions=["hello", end])
    assert (code, err) == (0, "")


def test_interrupting_an_answer_ends_only_the_answer(run, monkeypatch):
    def interrupted(*args, **options):
        yield "he"
        raise KeyboardInterrupt

    monkeypatch.setattr("minillm.inference.chat.session.stream", interrupted)
    code, shown, _ = run(questions=["hello", "again"])
    assert code == 0
    assert shown.count("he\n") == 2


def test_completion_mode_streams_plain_text(run, prompts_seen):
    code, shown, _ = run("--model_mode", 0, "--max_new_tokens", 3, questions=["once", "twice"])
    assert code == 0
    assert shown.count("tokens/s,") == 2
    assert prompts_seen == []


def test_weights_by_directory_and_by_pth(run, out, tokenizer, tmp_path):
    file = write(tmp_path / "valid.jsonl", {"text": "the cat"})

    def loss(*argv, **more):
        code, _, err = run("--perplexity", file, "--output", tmp_path / "o.json", *argv, **more)
        assert code == 0, err
        return json.loads((tmp_path / "o.json").read_text())["perplexity"]["nats_per_token"]

    expected = loss("--from_weight", "full_sft", "--hidden_size", 32)
    assert loss("--from_weight", out / "full_sft_32") == expected
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(out / "full_sft_32" / "config.json", beside)
    torch.save(tiny_model(1).state_dict(), beside / "model.pth")
    assert loss("--from_weight", beside / "model.pth") == expected
    assert loss() == expected != loss("--model_mode", 0)


def test_a_pth_without_configuration_takes_the_shape_from_the_flags(run, tokenizer, tmp_path):
    config = ModelConfig.preset("demo", vocab_size=267, num_hidden_layers=1, num_attention_heads=2)
    torch.save(Transformer(config).state_dict(), tmp_path / "bare.pth")
    file = write(tmp_path / "prompts.txt", "hi")
    shape = ("--preset", "demo", "--num_hidden_layers", 1, "--num_attention_heads", 2)
    code, _, err = run("--from_weight", tmp_path / "bare.pth", *shape, "--prompts", file, *GREEDY)
    assert code == 0, err


def test_rope_scaling_of_a_model_trained_without_it(run, out, tmp_path):
    """128 positions by its configuration; the limit moves with the scaling, the loss is that of a model saved so."""
    text = write(tmp_path / "valid.jsonl", {"text": "the cat sat on the mat and " * 9})

    def loss(*argv, code=0):
        result, _, err = run("--perplexity", text, "--output", tmp_path / "o.json", *argv)
        assert result == code, err
        return json.loads((tmp_path / "o.json").read_text())["perplexity"]["nats_per_token"] if not code else err

    long = ("--max_seq_len", 256)
    assert "128" in loss(*long, code=2)
    assert "--rope_original_len 129" in loss("--rope_scaling", "yarn:4", "--rope_original_len", 129, code=2)
    assert "80" in loss("--rope_scaling", "yarn:4", "--rope_original_len", 20, "--max_seq_len", 81, code=2)
    losses = [loss(*long, "--rope_scaling", f"{kind}:2") for kind in ("yarn", "linear", "dynamic")]
    losses += [loss(*long, "--rope_scaling", "yarn:8", "--rope_original_len", 32)]
    assert len(set(losses)) == 4
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    save_model(tiny_model(1, rope_scaling=yarn, max_position_embeddings=256), tmp_path / "saved")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(out / "full_sft_32" / file, tmp_path / "saved")
    saved = ("--from_weight", tmp_path / "saved")
    assert loss(*saved, *long) == losses[0]
    assert loss(*saved, "--rope_scaling", "none") == loss()


def test_refusals_are_one_line_and_exit_code_2(run, out, tokenizer, tmp_path):
    empty = write(tmp_path / "empty.txt", "", "  ")
    broken = write(tmp_path / "broken.jsonl", {"prompt": "a"}, "{")
    keyless = write(tmp_path / "keyless.jsonl", {"asked": "a"})
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    answerless = write(tmp_path / "answerless.jsonl", {"messages": turns})
    roleless = write(tmp_path / "roleless.jsonl", {"messages": [{"role": "robot", "content": "a"}]})
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for argv, words in [
        (["--from_weight", "rlhf"], ["rlhf", "full_sft_32", "pretrain_32"]),
        (["--model_mode", 2], ["rlhf", "full_sft_32", "pretrain_32"]),
        (["--hidden_size", 64], ["full_sft_64", "full_sft_32"]),
        (["--prompts", empty], ["empty.txt", "no prompt"]),
        (["--prompts", broken], ["broken.jsonl", "line 2"]),
        (["--prompts", keyless], ["line 1", "conversations"]),
        (["--prompts", roleless], ["line 1", "robot"]),
        (["--prompts", binary], ["binary.txt", "UTF-8"]),
        (["--prompts", tmp_path / "missing.txt"], ["missing.txt"]),
        (["--perplexity", tmp_path / "missing.jsonl"], ["missing.jsonl"]),
        (["--task_file", answerless], ["record 0", "user"]),
        (["--text_metrics"], ["--text_metrics needs --task_file"]),
        (["--output", nothing / "no" / "x.json"], ["--output"]),
        (["--top_p", 1.5], ["top_p 1.5"]),
        (["--max_new_tokens", 0], ["max_new_tokens 0"]),
        (["--rope_scaling", "yarn"], ["--rope_scaling yarn", "yarn:4"]),
        (["--rope_original_len", 64], ["--rope_original_len 64", "--rope_scaling"]),
        (["--tokenizer_path", nothing], ["tokenizer"]),
    ]:
        code, _, err = run(*argv)
        assert code == 2, argv
        assert len(err.strip().splitlines()) == 1, err
        assert all(word in err for word in words), err
    code, _, err = run(save_dir=nothing)
    assert code == 2
    assert "none" in err


def test_a_tokenizer_larger_than_the_embedding_is_refused(run, tmp_path, tokenizer):
    save_model(tiny_model(0, vocab_size=266), tmp_path / "full_sft_32", tokenizer=tokenizer)
    code, _, err = run(save_dir=tmp_path)
    assert code == 2
    assert "the tokenizer has 267 tokens" in err
    assert "embeddings for 266; give --tokenizer_path the tokenizer of these weights" in err
