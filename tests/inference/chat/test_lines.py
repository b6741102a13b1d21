"""Texts of several lines, without a terminal."""

import builtins

import pytest

from minillm.inference.chat.lines import LineReader, history_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["one"], ("one", True)),
        (["one\\", "two\\", "", "rest"], ("one\ntwo\n", True)),
        (["a\\\\", "b"], ("a\\\nb", True)),
        (['"""', "one", "", "two", '"""'], ("one\n\ntwo", False)),
        (['  """one', 'two"""  '], ("one\ntwo", False)),
        (['"""/help"""'], ("/help", False)),
        (['"""a\\', '"""'], ("a\\", False)),
        (['"""a "" b', EOFError()], ('a "" b', False)),
        (['""""""'], ("", False)),
        (["你好\\", "🙂"], ("你好\n🙂", True)),
    ],
)
def test_texts_of_several_lines(monkeypatch, typed, expected):
    waiting = iter(typed)

    def read(prompt):
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    assert LineReader([]).read() == expected


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_the_end_of_the_input_and_ctrl_c_are_passed_on(monkeypatch, end):
    waiting = iter(["a\\"])

    def read(prompt):
        if line := next(waiting, None):
            return line
        raise end

    monkeypatch.setattr(builtins, "input", read)
    with pytest.raises(end):
        LineReader([]).read()


def test_nothing_is_kept_without_a_terminal(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(builtins, "input", lambda prompt: "one")
    LineReader([]).read()
    assert history_path() == tmp_path / "minillm" / "chat_history"
    assert not list(tmp_path.iterdir())
