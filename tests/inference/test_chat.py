"""The conversation at the terminal, with a model that answers by rule."""

import builtins
from types import SimpleNamespace

import pytest

from minillm.errors import UserError
from minillm.inference import chat as module
from minillm.inference.chat import chat, speed

MODEL = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=40))


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run a chat over the typed lines; return what the model was given, how, and what was shown."""

    def talk(*lines, answer=None, history_turns=3, max_new_tokens=5, **options):
        seen, asked = [], []
        typed = iter(lines)

        def read(prompt=""):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        def encode(messages):
            """One id per character; the messages are kept."""
            seen.append([(message["role"], message["content"]) for message in messages])
            return [0] * sum(len(message["content"]) for message in messages)

        def stream(model, ids, **given):
            asked.append((len(ids), given))
            if len(ids) + 1 > model.config.max_position_embeddings:
                raise UserError(f"prompt of {len(ids)} is too long")
            yield from answer() if answer else ["o", "k"]
            return SimpleNamespace(ids=[1, 2, 3])

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(module, "stream", stream)
        chat(MODEL, encode, history_turns=history_turns, max_new_tokens=max_new_tokens, **options)
        shown = capsys.readouterr()
        return SimpleNamespace(seen=seen, asked=asked, out=shown.out, err=shown.err)

    return talk


def contents(messages):
    return [content for _, content in messages]


def test_answers_join_the_history_in_order(talk):
    done = talk("one", "two")
    assert done.seen == [[("user", "one")], [("user", "one"), ("assistant", "ok"), ("user", "two")]]
    assert "ok\n" in done.out
    assert done.out.count("[3 tokens in ") == 2


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_only_so_many_turns_are_remembered(talk, turns):
    done = talk("a", "b", "c", "d", history_turns=turns)
    asked = ["a", "b", "c", "d"]
    for number, messages in enumerate(done.seen):
        kept = asked[max(0, number - turns) : number]
        assert contents(messages) == [text for question in kept for text in (question, "ok")] + [asked[number]]


def test_the_oldest_are_forgotten_when_they_do_not_fit(talk):
    """40 positions, 5 of them for the answer: three questions of 12 with answers of 2 are 40, two are 26."""
    done = talk("a" * 12, "b" * 12, "c" * 12)
    assert contents(done.seen[-1]) == ["b" * 12, "ok", "c" * 12]
    assert [length for length, _ in done.asked] == [12, 26, 26]


def test_exactly_what_fits_is_kept(talk):
    done = talk("a" * 16, "b" * 17)  # 16 + 2 + 17 + 5 = 40
    assert [length for length, _ in done.asked] == [16, 35]
    done = talk("a" * 16, "b" * 18)
    assert [length for length, _ in done.asked] == [16, 18]


def test_clear_exit_and_empty_lines(talk):
    done = talk("one", "", "   ", " /clear ", "two", " /exit", "never")
    assert [contents(messages) for messages in done.seen] == [["one"], ["two"]]


def test_a_refused_question_does_not_end_or_enter_the_conversation(talk):
    done = talk("one", "x" * 50, "two")
    assert done.err == "error: prompt of 50 is too long\n"
    assert contents(done.seen[-1]) == ["one", "ok", "two"]


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()], ids=["end of input", "ctrl-c"])
def test_the_end_at_the_prompt_is_quiet(talk, end):
    done = talk("one", end, "never")
    assert len(done.seen) == 1
    assert done.err == ""
    assert done.out.endswith("\n")


def test_ctrl_c_ends_the_answer_only_and_keeps_what_was_said(talk):
    closed = []

    def interrupted():
        try:
            yield "hal"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    done = talk("one", "two", answer=interrupted)
    assert contents(done.seen[1]) == ["one", "hal", "two"]
    assert closed == [True, True]
    assert "tokens/s" not in done.out  # an answer that was cut says nothing about the speed


def test_options_reach_the_stream(talk):
    done = talk("one", temperature=0.5, stop=("x",))
    assert done.asked == [(3, {"max_new_tokens": 5, "temperature": 0.5, "stop": ("x",)})]


def test_the_speed_line():
    assert speed(1500, 2.0) == "[1,500 tokens in 2.0 s, 750 tokens/s]"
    assert speed(0, 0.0).startswith("[0 tokens in 0.0 s, 0 ")


REASONED = "<think>\n1 < 2\n\nso\n</think>\n<answer>\na </b> c\n</answer>\n"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


@pytest.fixture
def terminal(monkeypatch):
    """Let the output be a terminal, or with False none."""
    return lambda is_one=True: monkeypatch.setattr("sys.stdout.isatty", lambda: is_one, raising=False)


def test_a_reasoning_chat_shows_and_remembers_the_answer(talk):
    def answer():
        yield from ["<think>", "\nhm", "\n</think>", "\n<answer>\n", "8", "\n</answer>"]

    done = talk("one", "two", answer=answer, thinking="hide")
    assert contents(done.seen[1]) == ["one", "<think>\n\n</think>\n<answer>\n8\n</answer>", "two"]
    assert done.out.splitlines()[1] == "8"
    assert done.out.splitlines()[2].startswith("[3 tokens")
    assert "a <\n[3 tokens" in talk("one", answer=lambda: ["a", " <"], thinking="dim").out
    plain = talk("one", "two", answer=answer, thinking="plain")
    assert "\nhm\n8\n[3 tokens" in plain.out
    opened = talk("one", "two", answer=lambda: ["hm</think>8"], thinking="hide", opened="<think>\n")
    assert contents(opened.seen[1])[1] == "<think>\n\n</think>8"


def test_ctrl_c_while_it_thinks_leaves_no_colour_behind(talk, terminal):
    def interrupted():
        yield from ["<think>", "a long", " way"]
        raise KeyboardInterrupt

    terminal()
    done = talk("one", "two", answer=interrupted, thinking="dim")
    assert done.out.count(DIM) == done.out.count(PLAIN) > 0
    assert contents(done.seen[1])[1] == "<think>\n\n</think>"
