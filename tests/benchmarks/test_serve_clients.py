"""The benchmark of many clients, small: it counts right answers as right, and wrong ones as wrong."""

import json

import pytest

from benchmarks import serve_clients


def test_right_and_wrong_answers_are_told_apart(tmp_path, monkeypatch, python):
    monkeypatch.setattr("sys.executable", python)  # the server starts faster
    make_questions = serve_clients.make_questions
    wrong = serve_clients.Question("Who?", 1, "an answer that it will not give")
    monkeypatch.setattr(serve_clients, "make_questions", lambda *given: [*make_questions(*given), wrong])
    flags = {"n_clients": 6, "seconds": 1, "n_questions": 3, "max_new_tokens": 6, "leaving": 0.2}
    with pytest.raises(SystemExit):
        serve_clients.main([f"--{name}={value}" for name, value in (flags | {"output": tmp_path / "out.json"}).items()])
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["figures"]
    assert figures["right"] > figures["different"] > 0
    assert figures["failed"] == figures["pages_in_use"] == 0
    assert figures["right"] + figures["different"] + figures["left"] == figures["requests"]
