"""The commands of a chat."""

import json

import pytest

from minillm.data import read_records
from minillm.errors import UserError
from minillm.inference.chat.commands import ALIASES, COMMANDS
from tests.inference.chat.conftest import FakeModel


def test_help_has_every_command(talk):
    shown = talk("/help").out
    assert all(f"\n{name}" in shown for name in COMMANDS)
    assert all(name in shown for name in ALIASES)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/foo", "unknown command /foo: /help lists all"),
        ("/sav a.jsonl", "unknown command /sav: did you mean /save?"),
        ("/reset now", "/reset takes nothing after it, not 'now'"),
        ("/think maybe", "/think maybe: allowed are on, off, dim, plain, hide"),
        ("/save", "/save needs a file"),
        ("/save a.jsonl", "there is no answer yet: nothing to save"),
        ("/load", "/load needs a file"),
        ("/load no.jsonl", "no such data file: no.jsonl"),
        ("/retry", "there is no question yet"),
    ],
)
def test_wrong_commands_are_refused_in_one_line(talk, line, words):
    done = talk(line, "two")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert done.asked == [["two"]]


@pytest.mark.parametrize("question", ["/etc/hosts", "/ means what?", "//", '"""/reset"""', "what is /reset?", "/3"])
def test_questions_that_only_look_like_commands(talk, question):
    assert talk(question).asked == [[question.strip('"')]]


def test_the_system_message(talk):
    done = talk("/system", "/system be  kind", "one", "/reset", "two", "/system OFF", "three", system="first")
    assert done.asked == [["be  kind", "one"], ["be  kind", "two"], ["two", "ok", "three"]]
    assert [prompt[0][0] for prompt in done.model.prompts] == ["system", "system", "user"]
    assert "system message: first\n" in done.out
    assert "the system message stays" in done.out
    assert "system message: none\n" in done.out
    assert talk("/system one\\", "two", "q").asked == [["one\ntwo", "q"]]


def test_thinking_on_off_and_how_it_is_shown(talk):
    def answer():
        yield from ["<think>", "hm", "</think>", "8"]

    lines = ["/think hide", "1", "/think on", "2", "/think off", "3", "/think", "/think plain", "4"]
    done = talk(*lines, answer=answer, model=FakeModel(n_positions=200))
    assert done.model.starts == ["", "", "<think></think>", ""]
    answers = done.out.split("tokens in")
    assert ["hm" in text for text in answers[:4]] == [False, True, True, True]
    assert "thinking: off" in done.out
    assert done.asked[3][-2] == "<think>\n\n</think><think>\n\n</think>8"  # the start belongs to the answer


def test_a_model_without_the_tags_cannot_be_told_not_to_think(talk):
    model = FakeModel()
    model.direct_start = ""
    done = talk("/think off", "one", model=model)
    assert "no <think>" in done.err
    assert model.starts == [""]


def test_text_has_no_conversation(talk):
    model = FakeModel(completes_text=True)
    done = talk("/system a", "/think off", "/save a", "/load a", "one", "/retry", model=model)
    assert done.err.count("texts have no conversation") == 4
    assert done.asked == [["one"], ["one"]]


# ---- another model -----------------------------------------------------------------------------------------------


def test_another_model_goes_on_with_the_conversation(talk):
    other, calls = FakeModel("large"), []

    def load(name, lora_name):
        calls.append((name, lora_name))
        return other

    done = talk("/model", "one", "/model large", "two", "/lora cooking", "/lora off", load=load)
    assert "model: small, no adapter" in done.out
    assert done.asked == [["one"]]
    assert other.asked == [["one", "ok", "two"]]
    assert calls == [("large", ""), ("large", "cooking"), ("large", "")]


def test_the_adapter_is_shown(talk):
    load = FakeModel
    done = talk("/lora cooking:0.5", "/lora", "/model b", "/model", load=load)
    assert done.out.count("model: small, adapter: cooking:0.5\n") == 1
    assert done.out.count("model: b, no adapter\n") == 1
    assert "the conversation goes on" not in done.out


@pytest.mark.parametrize("error", [UserError("no weights 'x'; give --from_weight or --lora_name"), KeyboardInterrupt()])
def test_the_old_model_stays_after_an_error(talk, error):
    def load(name, lora_name):
        raise error

    done = talk("one", "/model x", "/lora y", "two", load=load)
    assert done.asked[1] == ["one", "ok", "two"]
    if isinstance(error, UserError):
        assert done.err.count("give /model or /lora; still model: small, no adapter\n") == 2
    else:
        assert done.out.count("[stopped]") == 2


# ---- another answer ----------------------------------------------------------------------------------------------


def test_retry_replaces_the_last_answer(talk, says):
    done = talk("one", "two", "/retry", "three", answer=says("a", "b", "c", "d"))
    assert done.asked == [["one"], ["one", "a", "two"], ["one", "a", "two"], ["one", "a", "two", "c", "three"]]


def test_retry_answers_a_question_that_has_no_answer(talk, says, stopped):
    done = talk("one", "/retry", "two", answer=says("", "b", "c"))
    assert done.asked == [["one"], ["one"], ["one", "b", "two"]]
    done = talk("one", "x" * 50, "/retry", "two")
    assert done.err.count("prompt of 50 is too long") == 2
    assert done.asked[-1] == ["one", "ok", "two"]


def test_the_old_answer_stays_when_nothing_replaces_it(talk):
    answers = iter([["a"], KeyboardInterrupt(), UserError("not finite"), ["b"], ["c"]])

    def answer():
        pieces = next(answers)
        if isinstance(pieces, BaseException):
            raise pieces
        yield from pieces

    done = talk("one", "/retry", "/retry", "two", answer=answer)
    assert done.asked == [["one"], ["one"], ["one"], ["one", "a", "two"]]


def test_a_stopped_answer_can_be_answered_again(talk):
    answers = iter([["hal", KeyboardInterrupt()], ["whole"], ["x"]])

    def answer():
        for piece in next(answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    done = talk("one", "/retry", "two", answer=answer)
    assert done.asked[-1] == ["one", "whole", "two"]


# ---- files -------------------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_saved_chat_is_a_record_for_training(talk, says, tmp_path):
    path = tmp_path / "chat.jsonl"
    answer = "<think>\nhm\n</think>\n<answer>\n你好 🙂\n</answer>"
    done = talk("one\\", "two", f"/save {tmp_path / 'chat'}", answer=says(answer), system="s")
    assert f"saved 1 answer as the last line of {path}\n" in done.out
    (record,) = read_records(path, strict=True)
    assert record.kind == "chat"
    assert record.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": answer},
    ]
    assert "你好 🙂" in path.read_text(encoding="utf-8")


def test_saving_again_replaces_the_own_line_and_no_other(talk, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": "of somebody else"}')  # and no line break at the end
    save = f"/save {path}"
    talk("one", save, "two", save, "/reset", "three", save)
    saved = lines_of(path)
    assert saved[0] == {"messages": "of somebody else"}
    contents = [[turn["content"] for turn in record["messages"]] for record in saved[1:]]
    assert contents == [["one", "ok", "two", "ok"], ["three", "ok"]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["chat.jsonl"]


def test_cut_answers_are_counted_when_saved(talk, stopped, tmp_path):
    done = talk("one", "two", f"/save {tmp_path / 'a.jsonl'}", answer=stopped("ha"))
    assert "2 of the answers were cut" in done.out


@pytest.mark.parametrize(
    ("name", "words"),
    [("chat.txt", "saved as .jsonl"), ("no/a.jsonl", "No such file or directory"), ("folder.jsonl", "directory")],
)
def test_what_cannot_be_written_is_refused(talk, tmp_path, name, words):
    (tmp_path / "folder.jsonl").mkdir()
    done = talk("one", f"/save {tmp_path / name}", "two")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert done.asked[-1] == ["one", "ok", "two"]


def test_a_loaded_chat_goes_on(talk, tmp_path):
    path = tmp_path / "my chats.jsonl"
    talk("one", f"/save {path}", system="s")
    talk("three", f"/save {path}")
    done = talk("zero", f"/load {path}", "four", f"/load {path} 1", "two", f"/save {path}", system="t")
    assert "loaded 1 answer from" in done.out
    assert done.asked[1:] == [["three", "ok", "four"], ["s", "one", "ok", "two"]]
    assert len(lines_of(path)) == 3  # what was loaded stays in its own line
    talk("five", f"/save {path}", f"/load {path}", "six", f"/save {path}")
    assert [len(record["messages"]) for record in lines_of(path)[3:]] == [2, 4]


def test_all_forms_that_training_reads_can_be_loaded(talk, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    records = [
        {"instruction": "q", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"},
                      {"role": "assistant", "content": "a", "reasoning_content": "hm"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
                      {"role": "tool", "content": "4"}, {"role": "assistant", "content": "a"}], "tools": tools},
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    lines = [line for number in range(1, 5) for line in (f"/load {path} {number}", "r")]
    done = talk(*lines, f"/save {tmp_path / 'b.jsonl'}")
    assert done.err == ""
    hidden = "<think>\n\n</think>\na"
    assert done.asked == [["q", "a", "r"]] * 2 + [["hi", "q", hidden, "r"], ["q", "", "4", "a", "r"]]
    assert done.model.tools == [None] * 3 + [tools]
    (saved,) = read_records(tmp_path / "b.jsonl")
    assert saved.tools == tools
    done = talk(f"/load {path} 1", "r", "/reset", "s", f"/load {path} 4", "/reset", "t", tools=[{"name": "x"}])
    assert done.model.tools == [[{"name": "x"}]] * 3


def test_a_question_without_an_answer_can_be_answered(talk, tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [("user", "one"), ("assistant", "a"), ("user", "two")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    done = talk(f"/load {path}", "/retry", "three")
    assert "/retry answers it" in done.out
    assert done.asked == [["one", "a", "two"], ["one", "a", "two", "ok", "three"]]


GOOD = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"{", "no usable record"),
        ("a.jsonl", b'{"messages": []}', "at least one entry"),
        ("a.jsonl", b'{"text": "a"}', "line 1 is a text record, not a conversation"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "is a preference record"),
        ("a.jsonl", f"{GOOD}\n{GOOD[:-5]}\n".encode(), "line 2: "),  # the last one is meant, not the one before
        ("a.jsonl", b"\xff\xfea", "UTF-16"),
        ("a.jsonl", b'"\xff"', "UTF-8"),
        ("a.json", b'{"messages": 3}', "messages"),
        ("a.bin", b"a", "unknown kind of file"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    ],
)
def test_broken_files_are_refused_and_the_conversation_stays(talk, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    done = talk("one", f"/load {tmp_path / name}", "two")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert done.asked[-1] == ["one", "ok", "two"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [name]  # reading writes no report of rejected lines


def test_a_line_is_chosen_by_its_number(talk, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{{\n{GOOD}\n[1]\n")
    done = talk(*(f"/load {path} {number}" for number in (1, 2, 3, 9)))
    assert "loaded 1 answer" in done.out
    assert [f"line {number}: " in done.err for number in (1, 2, 3)] == [True, False, True]
    assert f"{path} has no line 9" in done.err
