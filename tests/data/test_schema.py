import gzip
import json
from itertools import islice

import pytest

from minillm.data.records import read_prompts, read_records
from minillm.data.schema import Prompt, parse_prompt, parse_record
from minillm.data.sources.rejects import reason_kind
from minillm.errors import UserError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    "record, kind, messages",
    [
        ({"text": "hello"}, "text", None),
        ({"conversations": [USER, ANSWER]}, "chat", [USER, ANSWER]),
        ({"messages": [USER, ANSWER]}, "chat", [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "chat", [USER, ANSWER]),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "chat",
            [{"role": "system", "content": "s"}, USER, ANSWER],
        ),
        ({"instruction": "q", "input": "", "output": "a"}, "chat", [USER, ANSWER]),
        ({"instruction": "q", "input": "i", "output": "a"}, "chat", [{"role": "user", "content": "q\ni"}, ANSWER]),
        ({"instruction": "q", "output": "a", "history": [["q", "b"]]}, "chat", [USER, WORSE, USER, ANSWER]),
        (
            {"conversation": [{"system": "s", "input": "q", "output": "a"}, {"input": "q", "output": "b"}]},
            "chat",
            [{"role": "system", "content": "s"}, USER, ANSWER, USER, WORSE],
        ),
        ({"chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "preference", [USER]),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", [USER]),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]}, "preference", [USER]),
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "preference", [USER]),
        ({"prompt": "q", "completion": "a", "label": True}, "judged", [USER]),
    ],
)
def test_every_schema_becomes_the_normal_form(record, kind, messages):
    parsed = parse_record({**record, "task": "t", "log_prob": -1.5}, 3)
    assert (parsed.kind, parsed.messages, parsed.line) == (kind, messages, 3)
    assert parsed.extra == {"task": "t"}
    assert parsed.log_prob == -1.5
    if kind == "preference":
        assert (parsed.chosen, parsed.rejected) == ([ANSWER], [WORSE])
    if kind == "judged":
        assert (parsed.chosen, parsed.label) == ([ANSWER], True)


@pytest.mark.parametrize(
    "record, reason",
    [
        ([1], "JSON object"),
        ({"txt": "x"}, "fit no schema: txt;"),
        ({"text": None}, "fit no schema: none has a value;"),
        ({"text": 5}, "must be a string"),
        ({"text": "  \n"}, "empty"),
        ({"text": "x", "log_prob": "low"}, "log_prob"),
        ({"text": "x", "log_prob": float("nan")}, "log_prob"),
        ({"text": "x", "log_prob": 10**400}, "log_prob"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}, ANSWER]}, "'robot'; allowed: system, user, assistant, tool"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "'robot'; allowed: system, user.*gpt"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "string"),
        ({"instruction": "q", "input": "", "output": 5}, "string"),
        ({"instruction": 5, "output": "a"}, "instruction and input must be strings"),
        ({"instruction": "q", "output": "a", "history": 5}, "list of pairs"),
        ({"instruction": "q", "output": "a", "history": [["q", "a", "b"]]}, "list of pairs"),
        ({"system": "s", "conversations": ["q", ANSWER]}, "message 0 must be an object"),
        ({"conversation": [{"input": "q"}]}, "output"),
        ({"chosen": [USER, ANSWER], "rejected": [ANSWER, WORSE]}, "share every message"),
        ({"chosen": "a", "rejected": "b"}, "without a prompt"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "no prompt"),
        ({"prompt": "q", "chosen": [ANSWER, USER], "rejected": "b"}, "end with an assistant"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label"),
        ({"prompt": "q", "completion": 4, "label": 1}, "completion"),
    ],
)
def test_broken_records_say_why(record, reason):
    with pytest.raises(UserError, match=reason):
        parse_record(record, 1)


# ---- records as other projects write them ------------------------------------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


def said(who, value):
    return {"from": who, "value": value}


SYSTEM, BEFORE = turn("system", "s"), turn("user", "h")
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL_TURNS = [USER, {**turn("assistant", ""), "tool_calls": [WEATHER]}, turn("tool", "22°"), ANSWER]
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Rome"}}'

CHATS = {
    "alpaca": ({"instruction": "q", "input": "i", "output": "a"}, [turn("user", "q\ni"), ANSWER]),
    "alpaca with system and history": (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["q", "b"]]},
        [SYSTEM, USER, WORSE, USER, ANSWER],
    ),
    "alpaca with its own text": (
        {"instruction": "q", "input": "", "output": "a", "text": "### Instruction:\nq\n\n### Response:\na"},
        [USER, ANSWER],
    ),
    "dolly": ({"instruction": "q", "response": "a", "category": "open_qa"}, [USER, ANSWER]),
    "prompt, completion": ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    "prompt, completion as turns": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    "prompt, whole conversation": ({"prompt": "q ", "completion": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "prompt, response": ({"prompt": "q", "response": "a", "system_prompt": "s"}, [SYSTEM, USER, ANSWER]),
    "ms-swift": ({"query": "q", "response": "a", "history": [["q", "b"]]}, [USER, WORSE, USER, ANSWER]),
    "gsm8k": ({"question": "q", "answer": "a"}, [USER, ANSWER]),
    "input, output": ({"input": "q", "output": "a"}, [USER, ANSWER]),
    "reasoning": (
        {"prompt": "q", "response": "a", "reasoning_content": "why"}, [USER, {**ANSWER, "reasoning_content": "why"}],
    ),
    "sharegpt": ({"id": "1", "conversations": [said("human", "q"), said("gpt", "a")]}, [USER, ANSWER]),
    "sharegpt with system": (
        {"system": "s", "conversations": [said("user", "q"), said("bot", "a")]},
        [SYSTEM, USER, ANSWER],
    ),
    "the same system twice": ({"system": "s", "messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "system beside messages": ({"system": "s", "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "system prompt beside messages": ({"system_prompt": "s", "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    "system of a turn": (
        {"conversations": [{**said("human", "q"), "system": "s"}, said("gpt", "a")]}, [SYSTEM, USER, ANSWER],
    ),
    "both forms mixed": ({"messages": [said("human", "q"), ANSWER]}, [USER, ANSWER]),
    "a table with empty columns": (
        {"messages": [{**USER, "tool_calls": "", "name": None, "weight": None}, {**ANSWER, "tools": ""}], "tools": ""},
        [USER, ANSWER],
    ),
    "notes": ({"messages": [{**USER, "id": "7", "timestamp": 5}, {**ANSWER, "model": "m"}]}, [USER, ANSWER]),
    "weights that are as they are": ({"messages": [{**USER, "weight": 0}, {**ANSWER, "train": True}]}, [USER, ANSWER]),
    "parts": ({"messages": [turn("user", [{"type": "text", "text": "q"}]), ANSWER]}, [USER, ANSWER]),
    "parts and weights of llama-factory's new form": (
        {
            "messages": [
                {**turn("user", [{"type": "text", "value": "q"}]), "loss_weight": 0.0},
                {**turn("assistant", [{"type": "text", "value": "a"}]), "loss_weight": 1.0},
            ]
        },
        [USER, ANSWER],
    ),
    "two parts": (
        {"messages": [turn("user", [{"type": "text", "text": "q"}, {"type": "text", "text": " i"}]), ANSWER]},
        [turn("user", "q i"), ANSWER],
    ),
    "xtuner": (
        {
            "conversation": [
                {"system": "s", "input": "q", "output": "b"}, {"instruction": "q", "input": "i", "output": "a"}
            ]
        },
        [SYSTEM, USER, WORSE, turn("user", "q\ni"), ANSWER],
    ),
    "system beside conversation": (
        {"system": "s", "conversation": [{"input": "q", "output": "a"}]},
        [SYSTEM, USER, ANSWER],
    ),
    "lmsys": ({"conversation": [USER, ANSWER], "model": "m"}, [USER, ANSWER]),
    "glaive": (
        {
            "conversations": [
                said("human", "q"), said("function_call", CALL_TEXT), said("observation", "22°"), said("gpt", "a")
            ],
            "tools": "[]",
        },
        TOOL_TURNS,
    ),
    "openai's function call": (
        {
            "messages": [
                USER,
                {**turn("assistant", None), "function_call": {"name": "weather", "arguments": CALL_TEXT[24:-1]}},
                {**turn("function", "22°"), "name": "weather"},
                ANSWER,
            ]
        },
        [
            USER,
            {
                "role": "assistant",
                "tool_calls": [
                    {"type": "function", "function": {"name": "weather", "arguments": CALL_TEXT[24:-1]}}
                ],
            },
            {**turn("tool", "22°"), "name": "weather"},
            ANSWER,
        ],
    ),
    "tool calls as text": (
        {"messages": [USER, {**turn("assistant", ""), "tool_calls": f"[{CALL_TEXT}]"}, turn("tool", "22°"), ANSWER]},
        TOOL_TURNS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_chats_of_every_layout(name):
    record, messages = CHATS[name]
    parsed = parse_record(record, 1)
    assert (parsed.kind, parsed.messages) == ("chat", messages)


PAIRS = {
    "llama-factory, sharegpt": (
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")}, [USER],
    ),
    "llama-factory, sharegpt, several turns": (
        {
            "system": "s", "conversations": [said("human", "q"), said("gpt", "b"), said("human", "q")],
            "chosen": said("gpt", "a"), "rejected": said("gpt", "b"),
        },
        [SYSTEM, USER, WORSE, USER],
    ),
    "llama-factory, alpaca": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, [turn("user", "q\ni")],
    ),
    "ultrafeedback": (
        {
            "prompt": "q", "prompt_id": "7", "messages": [USER, ANSWER], "score_chosen": 8.0, "score_rejected": 5.0,
            "chosen": [USER, ANSWER], "rejected": [USER, WORSE],
        },
        [USER],
    ),
    "orca": ({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, USER]),
    "orca without a system": ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, [USER]),
    "system and prompt": ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, USER]),
    "system and whole conversations": (
        {"system": "s", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, [SYSTEM, USER],
    ),
    "system inside": ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]}, [SYSTEM, USER]),
    # The prompt stands in the replies too, and must not come twice.
    "repeated with a system": (
        {"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]}, [SYSTEM, USER],
    ),
    "repeated without its system": (
        {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, [SYSTEM, USER],
    ),
    "repeated with its system": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]}, [SYSTEM, USER],
    ),
    "the last of several user turns": (
        {"prompt": "q", "chosen": [BEFORE, WORSE, USER, ANSWER], "rejected": [BEFORE, WORSE, USER, WORSE]},
        [BEFORE, WORSE, USER],
    ),
    "a blank more": ({"prompt": " q\n", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, [USER]),
    "the same question twice": (
        {"prompt": "q", "chosen": [USER, WORSE, USER, ANSWER], "rejected": [USER, WORSE, USER, WORSE]},
        [USER, WORSE, USER],
    ),
    "repeated in one of them": ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": "b"}, [USER]),
    "repeated, system beside": (
        {"system": "s", "prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, [SYSTEM, USER],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_layout(name):
    record, prompt = PAIRS[name]
    parsed = parse_record(record, 1)
    assert parsed.kind == "preference"
    assert (parsed.messages, parsed.chosen, parsed.rejected) == (prompt, [ANSWER], [WORSE])


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"prompt": "q", "completion": "a", "label": True}, [USER]),
        ({"prompt": [USER], "completion": [ANSWER], "label": 1}, [USER]),
        ({"prompt": "q", "completion": [SYSTEM, USER, ANSWER], "label": True}, [SYSTEM, USER]),
        ({"prompt": "q", "response": "a", "label": 1.0, "system": "s"}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER], "label": True}, [USER]),
        ({"conversations": [said("human", "q"), said("gpt", "a")], "kto_tag": True}, [USER]),
        ({"instruction": "q", "input": "", "output": "a", "kto_tag": True}, [USER]),
    ],
)
def test_judged_answers_of_every_layout(record, prompt):
    parsed = parse_record(record, 1)
    assert (parsed.kind, parsed.messages, parsed.chosen, parsed.label) == ("judged", prompt, [ANSWER], True)
    worse = parse_record({key: False if key in ("label", "kto_tag") else item for key, item in record.items()}, 1)
    assert (worse.kind, worse.label) == ("judged", False)


TALK = [USER, ANSWER]


@pytest.mark.parametrize(
    "record, kind",
    [
        ({"prompt": "q", "text": "t"}, "text next to prompt"),
        ({"messages": TALK, "text": "t"}, "text next to messages"),
        ({"messages": TALK, "prompt": "other"}, "prompt next to messages"),
        ({"messages": TALK, "conversations": [USER, WORSE]}, "messages next to conversations"),
        ({"messages": TALK, "instruction": "be kind"}, "instruction next to messages"),
        ({"question": "q", "answer": "a", "context": "c"}, "context next to question"),
        ({"question": "q", "answer": "a", "choices": ["x", "y"]}, "choices next to question"),
        ({"prompt": "q", "completion": "a", "input": "i"}, "input next to prompt"),
        ({"question": "q", "answer": "a", "response": "b"}, "answer next to question"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "messages": [turn("user", "x")]}, "messages next to prompt"),
        ({"text": "t", "system": "s"}, "system next to text"),
        ({"system": "s", "messages": [turn("system", "t"), *TALK]}, "two system messages that differ"),
        ({"system": "s", "system_prompt": "t", "messages": TALK}, "two system messages that differ"),
        ({"system": 5, "messages": TALK}, "system must be a string"),
        ({"text": "t", "tools": [{"name": "f"}]}, "tools next to text"),
        ({"messages": TALK, "tools": "f(x)"}, "tools must be a list, not text"),
        ({"messages": TALK, "tools": [{"description": "a tool"}]}, "tool N needs a name"),
        (
            {"messages": TALK, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            "tools are declared twice and differ",
        ),
        ({"messages": [{**USER, "tools": [{"name": "f"}]}, ANSWER]}, "an unknown key inside a turn"),
        ({"messages": TALK, "images": ["a.png"]}, "images in a record"),
        ({"conversations": TALK, "image": "a.png"}, "image in a record"),
        ({"prompt": "<image> q", "completion": "a", "images": ["a.png"]}, "images in a record"),
        ({"text": "<image> a fox", "images": ["a.png"]}, "images in a record"),
        ({"messages": TALK, "weight": 0.5}, "a record has its own weight"),
        ({"text": "t", "weight": 0}, "a record has its own weight"),
        ({"messages": [USER, {**ANSWER, "train": False}]}, "a turn must not be a target"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "a turn must not be a target"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "a turn must not be a target"),
        ({"messages": [{**USER, "train": True}, ANSWER]}, "a turn must be a target"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "a turn has its own weight"),
        ({"messages": [{**USER, "colour": "red"}, ANSWER]}, "an unknown key inside a turn"),
        ({"messages": [{**USER, "instruction": "be kind"}, ANSWER]}, "an unknown key inside a turn"),
        ({"messages": [USER, {**ANSWER, "thinking": "why"}]}, "an unknown key inside a turn"),
        ({"messages": [{**USER, "name": "Ann"}, ANSWER]}, "an unknown key inside a turn"),
        ({"messages": [{**USER, "images": ["a.png"]}, ANSWER]}, "images inside a turn"),
        ({"messages": [turn("user", [{"type": "image", "image": "a"}]), ANSWER]}, "a part of a turn is not text"),
        ({"messages": [{**USER, "value": "other"}, ANSWER]}, "a turn has both content and value"),
        ({"messages": [{"speaker": "user", "content": "q"}, ANSWER]}, "a turn without a role"),
        ({"messages": [{"role": "robot", "content": "q"}, ANSWER]}, "message N has the unknown role …"),
        ({"conversation": [{"input": "q", "output": "a", "output_with_loss": "no"}]}, "an unknown key inside a turn"),
        (
            {"conversations": [said("human", "q"), said("function_call", "weather()")]},
            "a function call is not JSON with a name",
        ),
        ({"messages": TALK, "label": "funny"}, "label is neither good nor bad"),
        ({"messages": TALK, "label": True, "kto_tag": False}, "label and kto_tag differ"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True}, "label next to chosen and rejected"),
        ({"prompt": "q", "chosen": "a"}, "chosen without rejected"),
        ({"question": "q"}, "question has no answer next to it"),
        ({"answer": "a"}, "the keys fit no schema"),
        ({"messages": "[{'role': 'user'}]"}, "messages must be a list, not text"),
        (
            {"prompt": "q", "chosen": [turn("user", "x"), ANSWER], "rejected": [turn("user", "x"), WORSE]},
            "chosen and rejected with turns before the reply that are not certainly those of the prompt",
        ),
        (
            {"prompt": "q", "chosen": [SYSTEM, USER, ANSWER], "rejected": [turn("system", "t"), USER, WORSE]},
            "chosen and rejected with turns before the reply that are not certainly those of the prompt",
        ),
        (
            {"prompt": [SYSTEM, USER], "chosen": [turn("system", "t"), USER, ANSWER], "rejected": "b"},
            "chosen with turns before the reply that are not certainly those of the prompt",
        ),
        (
            {"prompt": "q", "chosen": [SYSTEM, ANSWER], "rejected": [SYSTEM, WORSE]},
            "chosen and rejected with turns before the reply that are not certainly those of the prompt",
        ),
        ({"conversations": TALK, "chosen": "a", "rejected": "b"}, "the prompt ends with an assistant turn"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(record, kind):
    with pytest.raises(UserError) as refused:
        parse_record(record, 1)
    assert reason_kind(str(refused.value)) == kind
    assert len(str(refused.value)) > len(kind) + 10  # behind the kind, what stood there and what to do
    assert "\n" not in str(refused.value)


def test_reasons_of_one_kind_count_together():
    reasons = ["message 3 has the unknown role 'bot'; allowed: a", "message 14 has the unknown role 'x: y'; allowed: a"]
    assert {reason_kind(reason) for reason in reasons} == {"message N has the unknown role …"}
    assert reason_kind("broken JSON: Expecting value, column 7") == "broken JSON"


def test_other_keys_stay_in_extra():
    record = {"prompt": "q", "completion": "a", "source": "web", "score": 3}
    assert parse_record(record, 1).extra == {"source": "web", "score": 3}


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_every_chat_is_a_prompt_without_its_answer(name):
    record, messages = CHATS[name]
    prompt = parse_prompt(record).content
    assert prompt == messages[:-1] or (messages[:-1] == [turn("user", prompt)] and record["prompt"].strip() == prompt)


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"prompt": "q"}, "q"),
        ({"text": "q"}, "q"),
        ({"question": "q"}, [USER]),
        ({"instruction": "q", "input": "i", "system": "s"}, [SYSTEM, turn("user", "q\ni")]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"conversations": [said("human", "q"), said("gpt", "a")]}, [USER]),
        ({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}, [SYSTEM, USER]),
        ({"messages": [USER, ANSWER], "label": False}, [USER]),
    ],
)
def test_prompts(record, prompt):
    assert parse_prompt(record) == Prompt(content=prompt)


def test_a_file_of_prompts(write, tmp_path):
    prompts = read_prompts(write("a.jsonl", [{"prompt": "q"}, {"question": "q", "answer": "a"}]))
    assert prompts == [Prompt(content="q"), Prompt(content=[USER], expected="a")]
    assert [prompt.turns for prompt in prompts] == [[USER], [USER]]
    assert [prompt.question for prompt in prompts] == ["q", "q"]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfwho,what\nx,q\n")
    assert read_prompts(tmp_path / "a.csv", columns="prompt=what") == [Prompt(content="q")]
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbfq\r\n\r\nr\n")
    assert read_prompts(tmp_path / "a.md") == [Prompt(content="q"), Prompt(content="r")]
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the keys fit no schema"):
        read_prompts(write("a.jsonl", [{"prompt": "q"}, {"kind": "q"}]))
    (tmp_path / "a.txt").write_bytes("你好吗\n".encode("gbk"))
    with pytest.raises(UserError, match="GB18030"):
        read_prompts(tmp_path / "a.txt")


# ---- tables ------------------------------------------------------------------------------------------------------


def test_cells_of_a_table_are_what_they_write(tmp_path):
    turns = json.dumps([USER, ANSWER]).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,system,note\n"{turns}",s,\n"{turns}",,x\n')
    assert [r.messages for r in read_records(tmp_path / "a.csv")] == [[SYSTEM, USER, ANSWER], [USER, ANSWER]]
    (tmp_path / "b.tsv").write_text("prompt\tcompletion\tlabel\n[1, 2]\ta\tTrue\nq\ta\t0\nq\ta\t\n")
    good, bad = read_records(tmp_path / "b.tsv")
    assert (good.messages, good.label, bad.label) == ([turn("user", "[1, 2]")], True, False)
    aside = json.loads((tmp_path / "b.tsv.rejected.jsonl").read_text())
    assert aside["reason"].startswith("label is neither good nor bad: it is ''")
    sides = [json.dumps([USER, side]).replace('"', '""') for side in (ANSWER, WORSE)]
    (tmp_path / "c.csv").write_text('chosen,rejected\n"{}","{}"\n'.format(*sides))
    (pair,) = read_records(tmp_path / "c.csv")
    assert (pair.messages, pair.chosen, pair.rejected) == ([USER], [ANSWER], [WORSE])
    (tmp_path / "d.csv").write_text('text\n{""a"": 1}\n')
    assert [r.text for r in read_records(tmp_path / "d.csv")] == ['{""a"": 1}']


# ---- columns -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, record, messages",
    [
        ("prompt=ask,completion=reply", {"ask": "q", "reply": "a"}, [USER, ANSWER]),
        (" prompt = ask , completion=reply,", {"ask": "q", "reply": "a"}, [USER, ANSWER]),
        ("messages=data.talk", {"data": {"talk": [USER, ANSWER]}}, [USER, ANSWER]),
        ("messages=data.talk", {"data.talk": [USER, ANSWER]}, [USER, ANSWER]),
        ("system=persona", {"persona": "s", "messages": [USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
        ("messages=messages", {"messages": [USER, ANSWER], "text": "other"}, [USER, ANSWER]),
        ("prompt=completion,completion=prompt", {"completion": "q", "prompt": "a"}, [USER, ANSWER]),
        ("question=question,answer=solution", {"question": "q", "solution": "a", "answer": "4"}, [USER, ANSWER]),
    ],
)
def test_columns_rename_and_choose(write, columns, record, messages):
    (parsed,) = read_records(write("a.jsonl", [record]), strict=True, columns=columns)
    assert parsed.messages == messages


def test_columns_say_what_they_cannot(write):
    path = write("a.jsonl", [{"ask": "q", "reply": "a"}])
    for columns, message in (
        ("ask=prompt", "'ask' is not a name of ours; known: text, conversations"),
        ("prompt", "'prompt' is not OURS=THEIRS"),
        ("prompt=", "is not OURS=THEIRS"),
        ("prompt=ask,prompt=reply", "'prompt' is given twice"),
        ("prompt=query", "the record lacks a column: 'query' of --columns prompt=query; its keys are ask, reply"),
        ("prompt=ask.deep,completion=reply", "the record lacks a column: 'ask.deep'"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_records(path, columns=columns))


# ---- files -------------------------------------------------------------------------------------------------------


def test_bad_lines_are_set_aside_with_their_numbers(write):
    good = {"text": "fine"}
    path = write("a.jsonl", [good, "", good, '{"text": "cut', {"text": ""}, '{"text": "\\ud800"}', good])
    assert [r.line for r in read_records(path)] == [1, 3, 6, 7]  # the surrogate is the tokenizer's to refuse
    rejected = [json.loads(x) for x in (path.parent / "a.jsonl.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [r["line"] for r in rejected] == [4, 5]
    assert "broken JSON" in rejected[0]["reason"]
    assert rejected[0]["raw"] == '{"text": "cut'


def test_a_reader_that_stops_early_writes_nothing(write):
    path = write("a.jsonl", [{"text": "x"}, "{", {"text": "y"}, "["])
    complete = path.parent / "a.jsonl.rejected.jsonl"
    complete.write_text("all of them\n")
    assert [r.text for r in islice(read_records(path), 2)] == ["x", "y"]
    assert complete.read_text() == "all of them\n"


def test_strict_makes_line_7_fatal_and_writes_nothing(write):
    path = write("a.jsonl", [{"text": "x"}] * 6 + ["{"] + [{"text": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 7: broken JSON"):
        list(read_records(path, strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]


def test_errors_come_at_once(tmp_path):
    with pytest.raises(UserError, match="no such data file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="directory"):
        read_records(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="is empty"):
        read_records(tmp_path / "empty.jsonl")
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match=r"readable are .jsonl"):
        read_records(tmp_path / "a.doc")


def test_a_file_without_a_usable_record(write):
    with pytest.raises(UserError, match=r"all 2 lines are bad; the first, line 1: broken JSON"):
        list(read_records(write("a.jsonl", ["{", "]"])))
    with pytest.raises(UserError, match="is empty"):
        list(read_records(write("b.jsonl", ["", " "])))


def test_gzip_and_parquet_read_alike(write, tmp_path):
    records = [{"text": "fox", "source": "s"}, {"text": "狐"}, {"messages": [USER, ANSWER]}]
    expected = list(read_records(write("a.jsonl", records)))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
    assert list(read_records(tmp_path / "a.jsonl.gz")) == expected
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = {key: [r.get(key) for r in records] for key in ("text", "source", "messages")}
    pyarrow.parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == expected


def test_damaged_containers_are_named(tmp_path):
    whole = gzip.compress(b'{"text": "x"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-10])
    with pytest.raises(UserError, match="damaged gzip"):
        list(read_records(tmp_path / "a.jsonl.gz"))
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="parquet"):
        list(read_records(tmp_path / "a.parquet"))
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["one word"]}), tmp_path / "a.parquet", compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole.replace(b"one word", b"one\x80word"))  # no UTF-8
    with pytest.raises(UserError, match=r"a\.parquet is not a readable parquet file"):
        list(read_records(tmp_path / "a.parquet"))


def test_txt_keeps_every_paragraph_and_bounds_documents(tmp_path):
    paragraphs = [f"Paragraph {n} says something.\nIn two lines." for n in range(1000)]
    path = tmp_path / "a.txt"
    path.write_text("\n\n" + "\n\n".join(paragraphs) + "\n", encoding="utf-8")
    records = list(read_records(path))
    assert "\n\n".join(r.text for r in records) == "\n\n".join(paragraphs)
    assert all(4096 <= len(r.text) < 4200 for r in records[:-1])
    lines = path.read_text("utf-8").split("\n")
    assert all(lines[r.line - 1] == r.text.split("\n")[0] for r in records)
    path.write_text("x" * 200_000, encoding="utf-8")  # one endless line
    assert [len(r.text) for r in read_records(path)] == [65536, 65536, 65536, 3392]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "a", "answer": ""},
        {"instruction": "a", "output": " \n"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    ],
)
def test_an_answer_that_says_nothing_is_refused(record):
    with pytest.raises(UserError, match="message 1 is an empty answer"):
        parse_record(record, 1)


def test_a_call_of_a_tool_needs_no_words():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert parse_record({"messages": [{"role": "user", "content": "a"}, call]}, 1).messages[1]["content"] == ""


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK, "tools": [{"name": "f"}]},
        {"messages": TALK, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"conversations": [said("human", "q"), said("gpt", "a")], "tools": '[{"name": "f"}]'},
        {"instruction": "q", "output": "a", "functions": [{"name": "f"}]},
        {"messages": [{**SYSTEM, "tools": '[{"name": "f"}]'}, *TALK]},
        {"messages": [{**SYSTEM, "functions": [{"name": "f"}]}, *TALK], "tools": [{"name": "f"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
    ],
)
def test_declared_tools(record):
    parsed = parse_record(record, 1)
    assert parsed.tools == [{"type": "function", "function": {"name": "f"}}]
    assert not {"tools", "functions"} & parsed.extra.keys()
    assert parse_prompt(record).tools == parsed.tools


@pytest.mark.parametrize("tools", [None, [], "[]", ""])
def test_no_tools(tools):
    assert parse_record({"messages": TALK, "tools": tools}, 1).tools is None
