"""Colours and progress bars: at terminals alone, unless the environment says otherwise."""

import io

import pytest

from minillm import terminal


class Stream(io.StringIO):
    """A text stream that is a terminal, or is not."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variables, is_terminal, wanted", [
    ({}, True, True), ({}, False, False), ({"TERM": "xterm"}, True, True), ({"TERM": "dumb"}, True, False),
    ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True), ({"FORCE_COLOR": "1"}, False, True),
    ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False), ({"FORCE_COLOR": "1", "TERM": "dumb"}, False, True),
])  # fmt: skip
def test_colours(monkeypatch, variables, is_terminal, wanted):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert terminal.use_colour(Stream(is_terminal)) == wanted
    monkeypatch.setattr("sys.stdout", Stream(is_terminal))
    assert terminal.use_colour() == wanted


@pytest.mark.parametrize("out", [True, False])
@pytest.mark.parametrize("err", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_bar_moves_where_both_streams_are_terminals(monkeypatch, out, err, enabled):
    monkeypatch.setattr("sys.stdout", Stream(out))
    monkeypatch.setattr("sys.stderr", shown := Stream(err))
    assert terminal.shows_progress() == (out and err)
    assert list(terminal.progress(range(3), enabled=enabled, desc="measuring", delay=0)) == [0, 1, 2]
    assert ("\rmeasuring: " in shown.getvalue()) == (out and err and enabled)
