"""The conversation at the prompt: what the model is given, what is kept, how it ends."""

from types import SimpleNamespace

import pytest

from minillm.data import read_records
from minillm.inference.chat import output, speed
from tests.inference.chat.conftest import FakeModel


def test_answers_join_the_history_in_order(talk):
    done = talk("one", "two")
    assert done.model.prompts == [[("user", "one")], [("user", "one"), ("assistant", "ok"), ("user", "two")]]
    assert "ok\n" in done.out
    assert done.out.count("[3 tokens in ") == 2


@pytest.mark.parametrize("turns", [0, 1, 2])
def test_only_so_many_turns_are_remembered(talk, turns):
    done = talk("a", "b", "c", "d", history_turns=turns)
    asked = ["a", "b", "c", "d"]
    for number, messages in enumerate(done.asked):
        kept = asked[max(0, number - turns) : number]
        assert messages == [text for question in kept for text in (question, "ok")] + [asked[number]]


def test_the_oldest_are_left_out_when_they_do_not_fit(talk):
    """40 positions, 5 of them for the answer: three questions of 12 with answers of 2 are 40, two are 26."""
    done = talk("a" * 12, "b" * 12, "c" * 12)
    assert done.asked[-1] == ["b" * 12, "ok", "c" * 12]
    assert [length for length, _ in done.calls] == [12, 26, 26]
    kept = talk("a" * 12, "b" * 12, "c" * 12, system="s")
    assert kept.asked[-1] == ["s", "b" * 12, "ok", "c" * 12]


def test_exactly_what_fits_is_kept(talk):
    done = talk("a" * 16, "b" * 17)  # 16 + 2 + 17 + 5 = 40
    assert [length for length, _ in done.calls] == [16, 35]
    done = talk("a" * 16, "b" * 18)
    assert [length for length, _ in done.calls] == [16, 18]


def test_clear_exit_and_empty_lines(talk):
    done = talk("one", "", "   ", " /clear ", "two", " /exit", "never")
    assert done.asked == [["one"], ["two"]]
    assert talk("Quit", "never").asked == talk("/EXIT", "never").asked == []


def test_a_refused_question_does_not_end_or_enter_the_conversation(talk):
    done = talk("one", "x" * 50, "two")
    assert done.err == "error: prompt of 50 is too long\n"
    assert done.asked[-1] == ["one", "ok", "two"]


def test_the_end_of_input_is_quiet(talk):
    done = talk("one", EOFError(), "never")
    assert len(done.asked) == 1
    assert done.err == ""
    assert done.out.endswith("\n")


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_in_a_row_ends(talk):
    ctrl_c = KeyboardInterrupt()
    done = talk(ctrl_c, "one", ctrl_c, "two", ctrl_c, ctrl_c, "never")
    assert done.asked[-1] == ["one", "ok", "two"]
    assert done.out.count("once more") == 3
    assert done.err == ""


def test_ctrl_c_ends_the_answer_only_and_keeps_what_was_said(talk):
    closed = []

    def interrupted():
        try:
            yield "hal"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    done = talk("one", "two", answer=interrupted)
    assert done.asked[1] == ["one", "hal", "two"]
    assert closed == [True, True]
    assert done.out.count("hal\n[stopped") == 2
    assert "tokens/s" not in done.out  # an answer that was stopped says nothing about the speed


def test_ctrl_c_while_a_piece_is_printed_ends_the_decoding():
    closed = []

    def pieces():
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    def push(piece):
        raise KeyboardInterrupt

    running = pieces()
    answer = output.show_answer(running, SimpleNamespace(mode="plain", push=push, finish=lambda: ""))
    assert (answer.text, answer.completion, closed) == ("a", None, [True])


def test_ctrl_c_before_the_first_word_leaves_no_trace(talk, stopped):
    done = talk("one", "two", answer=stopped())
    assert done.asked == [["one"], ["two"]]
    model = FakeModel()
    model.encode = lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt)
    done = talk("one", "/retry", model=model)
    assert done.out.count("[stopped]") == 2
    assert done.err == ""


@pytest.mark.parametrize("empty", ["", " \n", "\0"])
def test_an_empty_answer_is_not_kept(talk, says, empty):
    done = talk("one", "two", answer=says(empty, "b"))
    assert done.asked == [["one"], ["two"]]
    assert "[an empty answer" in done.out


def test_a_line_that_is_not_utf8_is_refused(talk):
    bad = UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte")
    done = talk("one", bad, "two")
    assert done.err == "error: the line is not UTF-8 text (byte 1)\n"
    assert done.asked[-1] == ["one", "ok", "two"]


def test_options_reach_the_stream(talk):
    done = talk("one", temperature=0.5, stop=("x",))
    fixed = {"tokenizer": done.model.tokenizer, "eos_token_id": (0,), "max_new_tokens": 5}
    assert done.calls == [(3, fixed | {"temperature": 0.5, "stop": ("x",)})]


def test_the_speed_line(talk, monkeypatch):
    assert speed(1500, 2.0) == "[1,500 tokens in 2.0 s, 750 tokens/s]"
    assert speed(30, 2.0, first_seconds=1.2344) == "[30 tokens in 2.0 s, 15 tokens/s, first after 1,234 ms]"
    assert speed(0, 0.0).startswith("[0 tokens in 0.0 s, 0 ")
    ticks = iter([0.0, 0.25, 1.5])  # start, first piece, end
    monkeypatch.setattr(output.time, "perf_counter", lambda: next(ticks))
    assert "[3 tokens in 1.5 s, 2 tokens/s, first after 250 ms]" in talk("one").out


@pytest.mark.parametrize(
    ("limit", "words"), [(3, "; cut at --max_new_tokens 3]"), (5, "; cut at the model's 40 positions]")]
)
def test_an_answer_that_the_limit_ends_says_so(talk, limit, words):
    def answer():
        yield "<think>\nlong "
        return "length"

    done = talk("one", "two", answer=answer, max_new_tokens=limit)
    assert words in done.out
    assert done.asked[1] == ["one", "<think>\n\n</think>", "two"]


def test_an_answer_cannot_command_the_terminal(talk):
    done = talk("one", "two", answer=lambda: ["a\x1b[2J\r", "\x07\n\tb\x9b"])
    assert "a\ufffd[2J\ufffd\ufffd\n\tb\ufffd\n" in done.out
    assert done.asked[1][1] == "a\x1b[2J\r\x07\n\tb\x9b"  # the model gets back what it said


# ---- thinking ----------------------------------------------------------------------------------------------------

REASONED = "<think>\nhm\n</think>\n<answer>\n8\n</answer>"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def test_a_reasoning_chat_shows_and_remembers_the_answer(talk, says):
    done = talk("one", "two", answer=says(REASONED, REASONED), thinking="hide")
    assert done.asked[1] == ["one", "<think>\n\n</think>\n<answer>\n8\n</answer>", "two"]
    assert "\n8\n[3 tokens" in done.out
    assert "hm" not in done.out
    assert "a <\n[3 tokens" in talk("one", answer=lambda: ["a", " <"]).out
    assert "\nhm\n8\n[3 tokens" in talk("one", answer=says(REASONED), thinking="plain").out
    opened = talk("one", "two", answer=says("hm</think>8", "9"), thinking="hide", model=FakeModel(opens_with="<think>"))
    assert "\n8\n[3" in opened.out
    assert opened.asked[1][1] == "<think>\n\n</think>8"


def test_a_note_never_stands_within_an_answer(talk, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\na b\n" in talk("one", answer=lambda: ["a", " ", "", "b"], thinking="hide").out
    stopped_thinking = talk("one", answer=lambda: ["<think>", "hm"], thinking="hide").out
    assert f"{DIM}thinking…{PLAIN}\r\x1b[K\n" in stopped_thinking


def test_text_is_shown_and_kept_as_it_is(talk, says):
    done = talk("one", answer=says(REASONED), model=FakeModel(completes_text=True))
    assert f"\n{REASONED}\n[3" in done.out


def test_ctrl_c_while_it_thinks_leaves_no_colour_behind(talk, stopped, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    done = talk("one", "two", f"/save {tmp_path / 'a.jsonl'}", answer=stopped("<think>", "a long", " way"))
    assert done.out.count(DIM) == done.out.count(PLAIN) > 0
    assert done.asked[1][1] == "<think>\n\n</think>"
    (record,) = read_records(tmp_path / "a.jsonl")
    assert record.messages[1]["content"] == "<think>a long way\n</think>"


# ---- a loop that calls tools -------------------------------------------------------------------------------------


def with_a_tool(reply, messages):
    """Call the model, add a tool's result, and call the model again: the form of a loop over tools."""
    yield (call := {"role": "assistant", "content": reply(messages, [{"name": "add"}])})
    yield (result := {"role": "tool", "content": "4"})
    yield {"role": "assistant", "content": reply([*messages, call, result])}


def test_tool_results_are_part_of_the_exchange(talk, says):
    done = talk("2+2", "why", answer=says("call", "four", "so", "yes"), respond=with_a_tool, history_turns=1)
    assert done.asked[1] == ["2+2", "call", "4"]
    assert done.asked[2] == ["2+2", "call", "4", "four", "why"]
    assert done.asked[3][-3:] == ["why", "so", "4"]
    assert done.model.tools == [[{"name": "add"}], None] * 2


def test_a_loop_may_end_with_results(talk):
    def without_answer(reply, messages):
        yield {"role": "assistant", "content": reply(messages)}
        yield {"role": "tool", "content": "not run"}

    assert talk("q", "r", respond=without_answer).asked[1] == ["q", "ok", "not run", "r"]


def test_thoughts_stay_between_a_tool_and_its_answer(talk, says):
    done = talk("q", "r", answer=says("<think>hm</think>c", "four", "d", "e"), respond=with_a_tool)
    assert done.asked[1] == ["q", "<think>hm</think>c", "4"]
    assert done.asked[2][:2] == ["q", "<think>\n\n</think>c"]


def test_an_exchange_that_stops_before_its_answer_is_not_kept(talk):
    answers = iter([["call"], KeyboardInterrupt(), ["ok"], ["ok"]])

    def answer():
        if isinstance(pieces := next(answers), KeyboardInterrupt):
            raise pieces
        yield from pieces

    done = talk("q", "r", answer=answer, respond=with_a_tool)
    assert done.asked[2] == ["r"]


def test_a_call_that_was_cut_is_left_out(talk, stopped):
    done = talk("q", "r", answer=stopped("so", "\n<tool_call>", '\n{"name": '))
    assert done.asked[1] == ["q", "so", "r"]
