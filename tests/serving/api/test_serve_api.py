"""The program: its flags, what it prints, and how it ends."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

import serve_api
from minillm.cli.command_line import parse
from minillm.cli.serve_arguments import ServeArguments
from minillm.errors import UserError
from minillm.hub import save_model
from minillm.lora import apply_lora, save_lora
from minillm.serving.api.server import serve

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    """A directory with the tiny model, and its adapter."""
    import copy

    directory = tmp_path_factory.mktemp("saved")
    save_model(model, directory / "tiny_32", tokenizer=tokenizer)
    adapted = copy.deepcopy(model)
    torch.manual_seed(1)
    apply_lora(adapted, rank=2)
    save_lora(adapted, directory / "lora" / "cooking_32")
    return directory


def test_the_program_serves_until_a_signal_and_finishes_what_runs(saved, python, single):
    command = [python, str(ROOT / "serve_api.py"), "--model", str(saved / "tiny_32"), "--save_dir", str(saved),
               "--lora", "cook=cooking", "--draft", "lookup", "--port", "0", "--dtype", "float32",
               "--device", "cpu"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MINILLM_API_KEY": "sk-from-variable"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        assert "parameters" in lines[0]
        address, _, names = lines[1].strip().partition("  models: ")
        assert names == "tiny_32, cook"
        assert address.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=address, api_key="sk-from-variable", max_retries=0)
        chunks = client.chat.completions.create(
            model="cook",
            messages=[{"role": "user", "content": "Who are you?"}],
            temperature=0,
            max_tokens=150,
            stream=True,
        )
        text = next(chunks).choices[0].delta.content
        process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == single("Who are you?", max_new_tokens=150).text  # B is 0: the adapter changes nothing
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert output == "ended\n"
    events = [json.loads(line) for line in errors.splitlines()]  # nothing else is on standard error
    assert [event["event"] for event in events] == ["ending", "request"]
    assert "sk-from-variable" not in errors + output
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


def test_the_announced_address_takes_connections():
    class Announced(Exception):
        pass

    def connect(port):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        raise Announced

    with pytest.raises(Announced):
        serve(None, host="127.0.0.1", port=0, on_start=connect)


def test_a_second_signal_ends_it_at_once(saved, python):
    command = [python, str(ROOT / "serve_api.py"), "--model", str(saved / "tiny_32"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        address = [process.stdout.readline() for _ in range(2)][1].partition(" ")[0]
        body = {"messages": [{"role": "user", "content": "Hi"}], "n": 64, "stream": True}
        with httpx.stream("POST", f"{address}/chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "cooking"], "NAME=ADAPTER"), (["--lora", "a=x", "--lora", "a=y"], "twice"),
        (["--port", "70000"], "65535"), (["--max_queue", "0"], "at least 1"), (["--max_body_mb", "0"], "positive"),
        (["--model", "nothing"], "give --model one"),
        (["--draft", "nothing"], "give --draft one"), (["--lora", "a=nothing"], "no adapter 'nothing'"),
        (["--temperature", "-1"], "temperature"), (["--host", "192.0.2.1"], "cannot listen"),
        (["--lora", "tiny_32=cooking"], "tiny_32"),
        (["--quantization", "int8", "--lora", "a=cooking"], "adapters"),
        (["--quantization", "int8", "--compile", "0"], "compiler"),
    ],
)  # fmt: skip
def test_wrong_flags_are_one_line(saved, capsys, flags, words):
    common = ["--save_dir", str(saved), "--device", "cpu", "--port", "0"]
    common += [] if "--model" in flags else ["--model", str(saved / "tiny_32")]
    with pytest.raises(SystemExit):
        serve_api.main([*common, *flags])
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1


def test_weights_in_int8_are_counted_as_before(saved, capsys, monkeypatch):
    monkeypatch.setattr(serve_api, "serve", lambda app, *, on_start, **_: on_start(8000))
    monkeypatch.setattr(serve_api.signal, "signal", lambda *_: None)
    lines = []
    for flags in ([], ["--quantization", "int8"]):
        serve_api.main(["--model", str(saved / "tiny_32"), "--device", "cpu", "--dtype", "float32", *flags])
        lines.append(capsys.readouterr().out.splitlines()[0])
    assert lines[1] == f"{lines[0]}, weights in int8"


def test_the_key_may_be_in_the_environment(monkeypatch):
    assert parse(ServeArguments, []).key == ""
    monkeypatch.setenv("MINILLM_API_KEY", "a")
    assert parse(ServeArguments, []).key == "a"
    assert parse(ServeArguments, ["--api_key", "b"]).key == "b"
    with pytest.raises(UserError):
        parse(ServeArguments, ["--n_pages", "-1"])
