"""The demo world's conversations with tools: calls that give the answers, refusals, and a test that shares nothing."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "dataset"))

import demo_tools
import make_demo
from demo_world import tool_use
from demo_world.arguments import DemoDataArguments

from minillm.serving.tools import Toolbox, tool_loop
from minillm.tokenizer import encode_chat, train_bpe

#: What a question looks like that needs the tool.
NEEDS = {"calculate": r"\d[*-]\d", "clock": r"time:|几点:", "search": r"number:|号:"}
SIZES = {name: 5 for name in DemoDataArguments.__dataclass_fields__ if name.startswith("n_")}
SIZES |= {"n_tools": 400, "n_addition": 40, "n_facts": 40, "n_tools_replay": 60, "n_tools_test": 12}


@pytest.fixture(scope="module")
def files():
    return make_demo.make_files(DemoDataArguments(**SIZES))[0]


def exchanges(record):
    """Each question of a record with the messages up to the next one."""
    parts = []
    for message in record["conversations"]:
        if message["role"] == "user":
            parts.append([])
        parts[-1].append(message)
    return parts


def with_tools(files, name):
    return [record for record in files[name] if record.get("tools")]


@pytest.mark.parametrize("name", ["tools_train", "tools_test"])
def test_calls_lead_to_the_answers_and_a_missing_tool_to_a_refusal(files, name):
    n_seen = Counter()
    for record in with_tools(files, name):
        declared = [tool["function"]["name"] for tool in record["tools"]]
        assert 1 <= len(set(declared)) == len(declared) <= 3
        for question, *rest in exchanges(record):
            text, answer = question["content"], rest[-1]["content"]
            if len(rest) == 1:
                is_refusal = answer in tool_use.REFUSALS.values()
                needed = [tool for tool, pattern in NEEDS.items() if re.search(pattern, text)]
                assert bool(needed) == is_refusal
                assert not set(needed) & set(declared)
                n_seen["refusal" if is_refusal else "direct"] += 1
                continue
            call, result, _ = rest
            function = call["tool_calls"][0]["function"]
            (argument,) = json.loads(function["arguments"]).values()
            assert function["name"] in declared
            assert argument in text
            assert result["content"] in answer
            if function["name"] == "calculate":
                assert answer == f"{argument}={eval(argument)}"
            n_seen[function["name"]] += 1
    assert set(n_seen) == {"calculate", "clock", "search", "direct", "refusal"}
    if name == "tools_test":
        groups = Counter(record["group"] for record in files[name])
        assert groups == n_seen
        assert set(groups.values()) == {12}


def test_the_test_shares_neither_openings_nor_numbers_nor_owners(files):
    openings, asked = {}, {}
    for name in ("tools_train", "tools_test"):
        texts = [part[0]["content"] for record in with_tools(files, name) for part in exchanges(record)]
        texts = [text for text in texts if any(re.search(pattern, text) for pattern in NEEDS.values())]
        openings[name] = {text.rpartition(":")[0] for text in texts}
        times = [text for text in texts if re.search(NEEDS["clock"], text)]  # the same ten places
        asked[name] = {re.sub(r"\W", " ", text.rpartition(":")[2]) for text in texts if text not in times}
        assert len(asked[name]) > 15
    assert not openings["tools_train"] & openings["tools_test"]
    assert not asked["tools_train"] & asked["tools_test"]


def test_old_conversations_are_among_the_new_ones(files):
    old = [record for record in files["tools_train"] if "tools" not in record]
    assert len(old) == 60
    assert all(record in files["sft_train"] for record in old)
    first_half = files["tools_train"][: len(files["tools_train"]) // 2]
    assert 15 < sum("tools" not in record for record in first_half) < 45


def test_only_what_the_assistant_writes_is_a_target(files):
    tokenizer = train_bpe(iter(["a"]), vocab_size=267)
    record = next(record for record in with_tools(files, "tools_test") if record["group"] == "search")
    ids, mask = encode_chat(tokenizer, record["conversations"], tools=record["tools"])
    _, call, result, answer = record["conversations"]
    function = call["tool_calls"][0]["function"]
    written = f'<tool_call>\n{{"name": "search", "arguments": {function["arguments"]}}}\n</tool_call><|im_end|>'
    targets = tokenizer.decode([i for i, is_target in zip(ids, mask, strict=True) if is_target])
    assert targets == written + answer["content"] + "<|im_end|>"
    assert tokenizer.decode(ids).count(result["content"]) == 2  # the result is read, and the answer repeats it


def test_the_tools_give_what_the_conversations_show(files, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("".join(record["text"] + "\n" for record in files["notes"]), "utf-8")
    monkeypatch.setattr(demo_tools, "NOTES", tmp_path / "notes.txt")
    toolbox = Toolbox(demo_tools.TOOLS)
    assert toolbox.schemas == list(tool_use.SCHEMAS.values())
    assert len(files["notes"]) == 2 * len(tool_use.OWNERS)
    assert demo_tools.search("cup").startswith("cup=")
    assert demo_tools.search("杯子").partition("=")[2] == demo_tools.search("cup").partition("=")[2]
    for word in (word for owner in tool_use.OWNERS for word in owner):
        assert re.fullmatch(rf"{word}=\d\d\d", demo_tools.search(word))
    assert demo_tools.search("cu") == "nothing found"
    for places in demo_tools.ZONES:
        for place in places:
            hours, minutes = map(int, demo_tools.clock(place).split(":"))
            assert (hours, minutes) < (24, 60)
    assert {place for places in demo_tools.ZONES for place in places} == {p for word in tool_use.PLACES for p in word}
    replies = ['<tool_call>{"name": "clock", "arguments": {"place": "X"}}</tool_call>', "?"]
    messages = list(tool_loop(lambda *_: replies.pop(0), [{"role": "user", "content": "q"}], toolbox))
    assert messages[1]["content"] == "error: ValueError: there is no clock in X"
