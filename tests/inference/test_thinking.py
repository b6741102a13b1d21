"""What is shown of a reasoned answer, and kept of it, however its text is cut."""

import itertools

import pytest

from minillm.inference.thinking import ThinkingView, mend_cut, without_thinking

REASONED = "<think>\n1 < 2\n\nso\n</think>\n<answer>\na </b> c\n</answer>\n"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@pytest.fixture
def terminal(monkeypatch):
    """Let the output be a terminal, or with False none."""
    return lambda is_one=True: monkeypatch.setattr("sys.stdout.isatty", lambda: is_one, raising=False)


def view(pieces, mode, **more):
    shown = ThinkingView(mode, **more)
    return "".join([*map(shown.push, pieces), shown.finish()])


def cuts(text):
    """The text whole, in single characters, and in three pieces with every pair of cuts."""
    yield [text]
    yield list(text)
    for first, second in itertools.combinations(range(1, len(text)), 2):
        yield [text[:first], text[first:second], text[second:]]


def test_thinking_is_dimmed_left_out_or_plain_however_the_text_is_cut(terminal):
    terminal()
    for pieces in cuts(REASONED):
        assert view(pieces, "plain") == "1 < 2\n\nso\na </b> c"
        assert view(pieces, "hide") == "a </b> c"
        dimmed = view(pieces, "dim").replace(PLAIN + DIM, "")  # pieces side by side
        assert dimmed == f"{DIM}1 < 2\n\nso{PLAIN}\na </b> c"


def test_a_file_gets_no_colours(terminal):
    terminal(False)
    assert view([REASONED], "dim") == view([REASONED], "plain")


@pytest.mark.parametrize(
    ("text", "plain", "hidden"),
    [
        ("", "", ""), ("  8\n", "8", "8"), ("1 < 2 <", "1 < 2 <", "1 < 2 <"), ("<think>1 + 1 </", "1 + 1 </", ""),
        ("<think>\n\n</think>\n<answer>8</answer>", "8", "8"), ("So <think>1</think> 2", "So\n1\n2", "So\n2"),
        ("<think>1<answer>2</answer>", "1\n2", "2"), ("</answer>8", "8", "8"), ("a<answered b",) * 3,
        ("<thinking>", "<thinking>", "<thinking>"), ("<<think>1</think>", "<\n1", "<"),
    ],
)  # fmt: skip
def test_what_lacks_the_form_is_shown_as_far_as_it_goes(text, plain, hidden):
    for pieces in ([text], list(text)):
        assert view(pieces, "plain") == plain
        assert view(pieces, "hide") == hidden


def test_what_cannot_be_a_tag_is_shown_at_once():
    shown = ThinkingView("plain")
    assert [shown.push(piece) for piece in ("<ans", "wer>8", " ", "<", "9", "</answ", "er>")] == [
        "", "8", "", "", " <9", "", ""
    ]  # fmt: skip


def test_thinking_that_the_prompt_has_opened(terminal):
    terminal()
    assert view(["so", "</think>8"], "dim", opened="<think>\n") == f"{DIM}so{PLAIN}\n8"
    assert view(["so", "</think>8"], "hide", opened="<think>\n") == "8"
    assert view(["8"], "dim", opened="<think>\n\n</think>\n\n") == "8"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("<think>\nso\n</think>\n<answer>\n8\n</answer>", "<think>\n\n</think>\n<answer>\n8\n</answer>"),
        ("<think>so", "<think>\n\n</think>"), ("8", "8"),
        ("<think>so\n<answer>8</answer>\n", "<think>\n\n</think><answer>8</answer>\n"),
    ],
)  # fmt: skip
def test_thoughts_are_not_remembered(said, kept):
    assert without_thinking(said) == kept


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("", ""), ("a b ", "a b "), ("<think>\na \n", "<think>\na\n</think>"),
        ("<think>a</think>\n<answer>8", "<think>a</think>\n<answer>8\n</answer>"), (REASONED, REASONED),
        ("<think>a<answer>b", "<think>a<answer>b\n</answer>"), ("</think> a", "</think> a"),
        ("a\n<tool_call>{", "a"), ("<tool_call>{}</tool_call>\n<tool_call>", "<tool_call>{}</tool_call>"),
        ("<think>a <tool_call>{", "<think>a\n</think>"), ("<think>a</think><tool_call>{}</tool_call>",) * 2,
    ],
)  # fmt: skip
def test_an_answer_that_was_cut_is_whole_again(text, mended):
    assert mend_cut(text) == mended
