"""eval_model.py with tools: prompts whose answers may call functions, and task files with tools."""

import json

import pytest
import torch

import eval_model
from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.inference import Completion
from minillm.model import Transformer
from minillm.serving.tools import Toolbox
from minillm.tokenizer import encode_chat, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1024}
    save_model(Transformer(ModelConfig(vocab_size=267, **shape)), folder / "full_sft_32", tokenizer=tokenizer)
    return folder


@pytest.fixture
def run(out, monkeypatch, capsys):
    def call(*argv, is_terminal=False):
        monkeypatch.setattr("sys.stdin.isatty", lambda: is_terminal, raising=False)
        try:
            eval_model.main(["--save_dir", str(out), "--device", "cpu", *map(str, argv)])
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def tools_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def double(n: int) -> int:\n    '''Double.'''\n    return 2 * n\n")
    return path


def test_prompts_with_tools(run, tools_file, tokenizer, tmp_path, monkeypatch):
    replies = ['I see.\n<tool_call>{"name": "double", "arguments": {"n": 21}}</tool_call>', "It is 42.", "Hello."]
    prompts = []

    def scripted(model, encoded, **options):
        prompts.extend(encoded)
        return [Completion(ids=[1], text=replies.pop(0), finish_reason="eos")]

    monkeypatch.setattr(eval_model, "complete", scripted)
    code, shown, _ = run(
        "--tools",
        tools_file,
        "--prompt",
        "21 twice?",
        "--prompt",
        "Hi",
        "--system",
        "s",
        "--output",
        tmp_path / "o.json",
    )
    assert code == 0
    assert '> 21 twice?\nI see.\n[double {"n": 21}]\n[double: 42]\nIt is 42.\n\n> Hi\nHello.\n' in shown
    first, second = json.loads((tmp_path / "o.json").read_text())["prompts"]
    assert (first["answer"], second["answer"]) == ("It is 42.", "Hello.")
    assert [message["role"] for message in first["messages"]] == ["assistant", "tool", "assistant"]
    question = [{"role": "system", "content": "s"}, {"role": "user", "content": "21 twice?"}]
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    function = {"name": "double", "description": "Double.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    for prompt, messages in zip(prompts, (question, question + first["messages"][:2]), strict=False):
        assert prompt == encode_chat(tokenizer, messages, tools=tools, add_generation_prompt=True)[0]


def test_a_task_file_with_tools(run, tmp_path):
    call = {"type": "function", "function": {"name": "double", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"conversations": turns, "tools": [call], "task": "t", "group": "g"}) + "\n")
    code, shown, _ = run("--task_file", path, "--max_new_tokens", 4, "--output", tmp_path / "o.json")
    assert code == 0
    assert f"calls on {path}\n" in shown
    assert "exact match after them\n" in shown
    results = json.loads((tmp_path / "o.json").read_text())
    assert results["tool_calls"]["task_average"] == results["exact_match"]["task_average"] == 0.0
    assert results["tool_calls"]["answers"][0]["expected"] == '[["double", {}]]'
    code, _, error = run("--task_file", path, "--text_metrics")
    assert (code, error.count("\n")) == (2, 1)
    assert "has calls: leave it out" in error


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tools", "none.py"], "--tools none.py: no such file"),
        (["--tools", "Makefile"], "--tools Makefile: no such file; give a Python file"),
        (["--tools", "{file}", "--model_mode", "0"], "--tools needs a chat model"),
    ],
)
def test_bad_flags_are_one_line(flags, message, run, tools_file):
    code, _, error = run(*[flag.replace("{file}", str(tools_file)) for flag in flags])
    assert (code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_chat_prints_results_between_replies_and_keeps_them(capsys):
    def double(n: int) -> int:
        """Double."""
        return 2 * n

    replies = ['<tool_call>{"name": "double", "arguments": {"n": 21}}</tool_call>', "It is 42."]
    asked = []

    def reply(messages, tools=None):
        asked.append(([message["role"] for message in messages], tools))
        return replies.pop(0)

    toolbox = Toolbox([double])
    question = [{"role": "user", "content": "21 twice?"}]
    messages = list(eval_model.respond_with_tools(toolbox, reply, question))
    assert [message["role"] for message in messages] == ["assistant", "tool", "assistant"]
    assert asked == [(["user"], toolbox.schemas), (["user", "assistant", "tool"], toolbox.schemas)]
    assert capsys.readouterr().out == "[double: 42]\n"


def test_a_chat_gets_the_tools(run, tools_file, monkeypatch):
    sessions = []
    monkeypatch.setattr(eval_model, "chat", sessions.append)
    code, _, _ = run("--tools", tools_file, is_terminal=True)
    assert code == 0
    (session,) = sessions
    assert [tool["function"]["name"] for tool in session.conversation.tools] == ["double"]
    replies = ['<tool_call>{"name": "double", "arguments": {"n": 4}}</tool_call>', "8"]
    messages = list(session.respond(lambda messages, tools=None: replies.pop(0), [{"role": "user", "content": "q"}]))
    assert messages[1]["content"] == "8"
