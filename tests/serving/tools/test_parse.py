"""Calls in a model's answer: every form, everything that only looks like one, and pieces of any size."""

import json
import random
import string
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.serving.tools.parse import ToolCallParser, parse_tool_calls
from minillm.tokenizer import encode_chat, train_bpe

ADD = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
FIND = '{"name": "find", "arguments": {"text": "鸟 </tool_call> } \\" {"}}'
TOOLS = [{"type": "function", "function": {"name": "add"}}, {"name": "find"}]


def shape(parsed):
    """Content, and (name, arguments as values) of each call; the form of the calls is checked."""
    content, calls = parsed
    for call in calls:
        assert set(call) == {"id", "type", "function"}
        assert call["type"] == "function"
        assert set(call["function"]) == {"name", "arguments"}
        assert len(call["id"]) == 9
        assert set(call["id"]) <= set(string.ascii_letters + string.digits)
    return content, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def in_pieces(text, cuts, tools=None):
    parser = ToolCallParser(tools=tools)
    edges = [0, *sorted(cuts), len(text)]
    results = [parser.push(text[start:end]) for start, end in pairwise(edges)] + [parser.finish()]
    return "".join(content for content, _ in results), [call for _, calls in results for call in calls]


add = ("add", {"a": 1, "b": 2})
find = ("find", {"text": '鸟 </tool_call> } " {'})

CALLS = [
    (f"<tool_call>\n{ADD}\n</tool_call>", "", [add]),
    (f"<tool_call>{ADD}</tool_call>\n<tool_call>\n{FIND}\n</tool_call>", "", [add, find]),
    (f"Let me see.\n<tool_call>\n{FIND}\n</tool_call>", "Let me see.", [find]),
    (f"a \n <tool_call>{ADD}</tool_call>\n\n b\n<tool_call>{ADD}</tool_call> \n", "a\nb", [add, add]),
    (f"<tool_call>{ADD}", "", [add]),  # the answer was cut before the tag, or the tag was its stop string
    (f"<tool_call>{ADD}\n</tool", "</tool", [add]),
    (f"<tool_call>{ADD} and <b>", "and <b>", [add]),
    (f"<think>\n<tool_call>{ADD}</tool_call> or {ADD}\n</think>\n<tool_call>{FIND}</tool_call>",
     f"<think>\n<tool_call>{ADD}</tool_call> or {ADD}\n</think>", [find]),
    (f"[TOOL_CALLS] [{ADD}, {FIND}]", "", [add, find]),
    (f"so[TOOL_CALLS]{ADD}", "so", [add]),
    ('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]my.f-2[CALL_ID]abc[ARGS] {}', "", [add, ("my.f-2", {})]),
    ('{"name": "add", "parameters": {"a": 1, "b": 2}}', "", [add]),
    (f'\n{{"name": "add", "parameters": {{"a": 1, "b": 2}}}}; {FIND}', "", [add, find]),
    (f"<|python_tag|>{ADD} ;\n{FIND} <|python_tag|>{ADD}", "", [add, find, add]),
    (f"[{ADD}]\n", "", [add]),  # Mistral's token and Llama's are special: decoding drops them
    ('<tool_call>{"type": "function", "function": ' + ADD + "}</tool_call>", "", [add]),
    ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', "", [add]),  # JSON within JSON
    ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}</tool_call>\n<tool_call>' + FIND + "</tool_call>",
     '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}</tool_call>', [find]),  # a brace is missing
    ('<tool_call>{"name": "add\n</tool_call>\n<tool_call>' + FIND + "</tool_call>",
     '<tool_call>{"name": "add\n</tool_call>', [find]),  # a string does not end
]  # fmt: skip

TEXTS = [
    "", "\n", " a\n", "no call", "1 < 2 [TOOL", "<tool_call>", "<tool_call>\n", "<tool_call>add(1, 2)</tool_call>",
    '<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>', '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "a"}</tool_call>', "<tool_call>[" + ADD + "]</tool_call>",
    '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', "<tool_call>{'name': 'add'}</tool_call>",
    '<tool_call>{"name": "add\n", "arguments": {}}</tool_call>', '<tool_call>{"name": "add", "arguments": {"a": 1,}}',
    '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>',  # has no UTF-8 form
    '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 9999 + "}}", "<tool_call>" + '{"a":' * 99,
    '{"answer": 42}', "[1, 2]", "[]", "[{}]", '[{"a": 1}]', "{", "[", '{"name": "other", "arguments": {}}',
    f"so: {ADD}", f"<think>{ADD}", "[TOOL_CALLS]", "[TOOL_CALLS][]", "[TOOL_CALLS]add[ARGS][1]", "[TOOL_CALLS]add",
    "[TOOL_CALLS]add {}", "[TOOL_CALLS]" + "x" * 500 + "[ARGS]{}", "[TOOL_CALLS]" + " " * 201 + "[" + ADD + "]",
    "<|python_tag|>print(1)", "</tool_call>", "<think></think>", "<tool_call><tool_call>{", "},{",
]  # fmt: skip


@pytest.mark.parametrize("text, content, calls", CALLS)
def test_calls_of_every_form(text, content, calls):
    assert shape(parse_tool_calls(text)) == shape(parse_tool_calls(text, tools=TOOLS)) == (content, calls)
    for cut in range(len(text)):
        assert shape(in_pieces(text, [cut])) == (content, calls)
    assert shape(in_pieces(text, range(len(text)))) == (content, calls)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_stays_text_to_the_last_character(text):
    assert parse_tool_calls(text, tools=TOOLS) == (text, [])
    for cut in range(0, len(text), 1 + len(text) // 200):
        assert in_pieces(text, [cut], TOOLS) == (text, [])
    assert in_pieces(text, range(len(text)), TOOLS) == (text, [])


def test_json_without_a_token_is_a_call_only_of_a_declared_function():
    text = '{"name": "sort", "arguments": {}}'
    assert shape(parse_tool_calls(text)) == ("", [("sort", {})])
    assert parse_tool_calls(text, tools=TOOLS) == (text, [])
    assert parse_tool_calls(text, tools=[]) == (text, [])
    marked = f"<tool_call>{text}</tool_call>"  # a call for certain: the caller answers that there is no such function
    assert shape(parse_tool_calls(marked, tools=TOOLS)) == ("", [("sort", {})])
    both = f"{ADD}; {text}"
    assert shape(parse_tool_calls(both, tools=TOOLS)) == ("; " + text, [add])


PARTS = st.sampled_from(
    [ADD, FIND, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "add[ARGS]", "<|python_tag|>", "<think>", "</think>",
     "{", "}", "[", "]", ";", '"', "\\", "\n", " ", "a", "鸟", "<", "\u3000", '{"name": "add", ', '"arguments": {}}']
)  # fmt: skip


@given(st.lists(PARTS, max_size=12).map("".join), st.data(), st.sampled_from([None, TOOLS, []]))
@settings(max_examples=400, deadline=None)
def test_pieces_give_the_same_as_the_whole(text, data, tools):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = shape(parse_tool_calls(text, tools=tools))
    assert shape(in_pieces(text, cuts, tools)) == whole
    assert shape(in_pieces(text, range(len(text)), tools)) == whole
    if not whole[1]:
        assert whole[0] == text


def test_a_stream_holds_back_only_what_may_begin_a_call():
    parser = ToolCallParser()
    assert parser.push("1 < 2") == ("1 < 2", [])
    assert parser.push(" and <tool") == (" and", [])
    assert parser.push("box>") == (" <toolbox>", [])
    assert parser.push("\n<tool_call>\n" + ADD[:-1]) == ("", [])
    content, (call,) = parser.push(ADD[-1])  # complete before its closing tag
    assert (content, call["function"]["name"]) == ("", "add")
    assert parser.push("\n</tool_call>x") == ("\nx", [])
    assert parser.finish() == ("", [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@given(
    st.sampled_from(["", "I look.", "鸟:\n\n{}"]),
    st.lists(st.tuples(st.text(st.characters(codec="utf-8"), min_size=1), st.dictionaries(st.text(), JSON, max_size=3)),
             min_size=1, max_size=3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_what_our_chat_format_writes_is_read_back(tokenizer, content, calls):
    """Reply -> message -> the same tokens again: the next prompt has the answer as the model wrote it."""
    tool_calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content, "tool_calls": tool_calls}]
    try:
        ids, mask = encode_chat(tokenizer, messages)
    except ValueError:  # text without a UTF-8 form
        return
    reply = tokenizer.decode([i for i, is_target in zip(ids, mask, strict=True) if is_target][:-1])
    parsed = parse_tool_calls(reply)
    assert shape(parsed) == (content, calls)
    again = {"role": "assistant", "content": parsed[0] or None, "tool_calls": parsed[1]}
    assert encode_chat(tokenizer, [messages[0], again]) == (ids, mask)


@pytest.mark.parametrize("part", ["<tool_call>{", "<tool_call>", "<think></think>", '<tool_call>"', "[TOOL_CALLS]["])
def test_the_time_grows_only_with_the_length(part):
    text = (part * 40_000)[:400_000]
    start = time.perf_counter()
    content, calls = parse_tool_calls(text)
    assert (content, calls) == (text, [])
    assert time.perf_counter() - start < 5  # 0.1 s; with the square of the length it would take minutes


def test_random_cuts_of_a_long_answer():
    rng = random.Random(0)
    parts = [f"\n<tool_call>\n{FIND}\n</tool_call>", "word ", "<tool_call>{", "鸟"]
    text = "".join(rng.choices(parts, k=300))
    whole = shape(parse_tool_calls(text))
    assert len(whole[1]) > 40
    assert shape(in_pieces(text, rng.sample(range(len(text)), 100))) == whole
