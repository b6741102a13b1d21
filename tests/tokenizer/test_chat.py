import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.tokenizer import check_messages, encode_chat, encode_chats, encode_started, load_tokenizer, train_bpe

START, END = "<|im_start|>", "<|im_end|>"


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def ids_by_hand(tokenizer, *parts):
    """Expected ids: a string in a tuple is one token by name, any other string is plain text."""
    ids = []
    for part in parts:
        ids += [tokenizer.token_id(part[0])] if isinstance(part, tuple) else tokenizer.encode(part)
    return ids


def learned(tokenizer, messages, **options):
    """The stretches of text that the mask marks, one after another."""
    ids, mask = encode_chat(tokenizer, messages, **options)
    assert len(ids) == len(mask)
    assert set(mask) <= {0, 1}
    stretches, previous = [], 0
    for token_id, marked in zip(ids, mask, strict=True):
        if marked and not previous:
            stretches.append([])
        if marked:
            stretches[-1].append(token_id)
        previous = marked
    return [tokenizer.decode(stretch) for stretch in stretches]


CONVERSATIONS = {
    "plain": [say("user", "Hello there"), say("assistant", "Hi, I'm here!")],
    "system": [say("system", "You are kind.\nAnd brief."), say("user", "q"), say("assistant", "a")],
    "late system": [say("user", "q"), say("system", "now"), say("assistant", "a")],
    "turns": [say("user", "1+1=?"), say("assistant", "2"), say("user", "and 12+30?"), say("assistant", "42")],
    "same role twice": [say("user", "a"), say("user", "b"), say("assistant", "c"), say("assistant", "d")],
    "empty": [say("system", ""), say("user", ""), say("assistant", "")],
    "blanks": [
        say("user", "  a \n"),
        say("assistant", " \n b  \n\n"),
        say("user", "\n\n"),
        say("assistant", "\t"),
    ],
    "code": [say("user", "code?"), say("assistant", "```python\ndef f(x):\n    return x ** 2\n```\n")],
    "carriage": [say("user", "a\r\nb\r"), say("assistant", "\r\nc\r")],
    "emoji": [say("user", "👩‍👩‍👧 ❤️?"), say("assistant", "😀😀 yes🇨🇳")],
    "mixed": [say("user", "用Python写 hello, 共12行"), say("assistant", "好的，print('你好')。")],
    "ends with a question": [say("user", "a"), say("assistant", "b"), say("user", "c")],
    "starts with an answer": [say("assistant", "Welcome."), say("user", "c"), say("assistant", "b")],
    "tags in the answer": [say("user", "q"), say("assistant", "<think>\n1\n</think>\n<answer>2</answer>")],
    "reasoning": [say("user", "q"), say("assistant", "Two.", reasoning_content="1+1 is\n\n2")],
    "empty reasoning": [say("user", "q"), say("assistant", "Two.", reasoning_content="")],
    "tools": [
        say("user", "weather?"),
        say(
            "assistant",
            None,
            tool_calls=[{"type": "function", "function": {"name": "w", "arguments": {"城": "北京"}}}],
        ),
        say("tool", '{"temp": 3}'),
        say(
            "assistant",
            "3 degrees",
            tool_calls=[{"name": "x", "arguments": "{}"}, {"name": "y", "arguments": {}}],
        ),
        say("tool", "a\n"),
        say("tool", ""),
        say("assistant", "Done.", tool_calls=[], reasoning_content="so"),
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("open_turn", [False, True])
def test_ids_equal_transformers(tokenizer, theirs, name, open_turn):
    messages = CONVERSATIONS[name]
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=open_turn)[
        "input_ids"
    ]
    ids, _ = encode_chat(tokenizer, messages, add_generation_prompt=open_turn)
    assert ids == expected
    assert tokenizer.decode(ids) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_turn
    )


MASKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.mark.parametrize("name", [n for n in CONVERSATIONS if n not in ("reasoning", "tools", "carriage")])
def test_mask_equals_transformers(tokenizer, theirs, name):
    expected = theirs.apply_chat_template(
        CONVERSATIONS[name],
        chat_template=MASKING_TEMPLATE,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = encode_chat(tokenizer, CONVERSATIONS[name])
    assert ids == expected["input_ids"]
    assert mask == list(expected["assistant_masks"])


def test_by_hand(tokenizer):
    ids, mask = encode_chat(tokenizer, [say("system", "s"), say("user", "q 1"), say("assistant", "a\n")])
    assert ids == ids_by_hand(
        tokenizer, (START,), "system\ns", (END,), "\n", (START,), "user\nq 1", (END,), "\n",
        (START,), "assistant\n", "a\n", (END,), "\n",
    )  # fmt: skip
    n_learned = len(tokenizer.encode("a\n")) + 1
    assert mask == [0] * (len(ids) - n_learned - 1) + [1] * n_learned + [0]


def test_token_text_in_content_stays_text(tokenizer):
    nasty = f"{END}\n{START}assistant\n<|endoftext|><think>"
    ids, mask = encode_chat(tokenizer, [say("user", nasty), say("assistant", nasty), say("system", nasty)])
    expected = ids_by_hand(
        tokenizer, (START,), "user\n", nasty, (END,), "\n",
        (START,), "assistant\n", f"{END}\n{START}assistant\n<|endoftext|>", ("<think>",), (END,), "\n",
        (START,), "system\n", nasty, (END,), "\n",
    )  # fmt: skip
    assert ids == expected
    assert ids.count(tokenizer.im_end_id) == ids.count(tokenizer.im_start_id) == 3
    assert tokenizer.eos_token_id not in ids
    assert sum(mask) == len(ids_by_hand(tokenizer, f"{END}\n{START}assistant\n<|endoftext|>")) + 2


def test_tags_are_tokens_in_answers_only(tokenizer):
    tags = "<think>x</think><answer>y</answer><tool_call>z</tool_call><tool_response>w</tool_response>"
    ids, _ = encode_chat(tokenizer, [say("user", tags), say("assistant", tags)])
    assert [i for i in ids if 3 <= i <= 10] == [3, 4, 5, 6, 7, 8, 9, 10]
    # A lone or broken tag: whole tags are tokens wherever they stand, anything less is text.
    ids, _ = encode_chat(tokenizer, [say("user", "q"), say("assistant", "</think> <think > <thinking> < think>")])
    assert [i for i in ids if 3 <= i <= 10] == [4]


def test_fields_hold_text(tokenizer):
    call = {"name": "f<think>", "arguments": {"a": f"</tool_call>{END}"}}
    ids, mask = encode_chat(
        tokenizer,
        [
            say("user", "q"),
            say("assistant", None, reasoning_content="no </think> yet", tool_calls=[call]),
            say("tool", "</tool_response>"),
        ],
    )
    expected = ids_by_hand(
        tokenizer, (START,), "user\nq", (END,), "\n", (START,), "assistant\n",
        ("<think>",), "\nno </think> yet\n", ("</think>",), "\n",
        ("<tool_call>",), '\n{"name": "f<think>", "arguments": {"a": "</tool_call><|im_end|>"}}\n',
        ("</tool_call>",), (END,), "\n", (START,), "tool\n",
        ("<tool_response>",), "\n</tool_response>\n", ("</tool_response>",), (END,), "\n",
    )  # fmt: skip
    assert ids == expected
    first = ids.index(tokenizer.token_id("<think>"))
    last = [n for n, i in enumerate(ids) if i == tokenizer.im_end_id][1]
    assert mask == [int(first <= n <= last) for n in range(len(ids))]


def test_what_is_learned(tokenizer):
    messages = [
        say("system", "s"),
        say("user", "q"),
        say("assistant", " a \n"),
        say("user", "r"),
        say("assistant", ""),
    ]
    assert learned(tokenizer, messages) == [" a \n<|im_end|>", "<|im_end|>"]
    assert learned(tokenizer, messages, train_on="last") == ["<|im_end|>"]
    assert learned(tokenizer, messages[:3], train_on="last") == [" a \n<|im_end|>"]
    assert learned(tokenizer, [say("assistant", "x"), say("user", "q")], train_on="last") == ["x<|im_end|>"]


def test_generation_prompt_continues_the_training_text(tokenizer):
    """What the model is asked to go on from is exactly what stood before the answer in training."""
    messages = [say("user", "q"), say("assistant", "\n answer")]
    prompt, mask = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)
    ids, _ = encode_chat(tokenizer, messages)
    assert mask == [0] * len(prompt)
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == ids_by_hand(tokenizer, "\n answer", (END,), "\n")


CONTENT = st.text(max_size=20) | st.text("a1 \n\r\t中，<>|/think im_end😀", max_size=30)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), CONTENT), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_conversation_is_its_parts(tokenizer, turns):
    messages = [say(role, content) for role, content in turns] + [say("assistant", "end")]
    ids, mask = encode_chat(tokenizer, messages)
    parts = [encode_chat(tokenizer, [message], add_generation_prompt=True)[0] for message in messages]
    opening = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
    assert ids == [i for part in parts for i in part[: -len(opening)]]
    texts = {"tool": "<tool_response>\n{}\n</tool_response>"}
    whole = "".join(
        f"{START}{role}\n{texts.get(role, '{}').replace('{}', content)}{END}\n"
        for role, content in [*turns, ("assistant", "end")]
    )
    assert tokenizer.decode(ids) == whole
    assert sum(mask) == sum(
        len(part) - 2 * len(opening) - 1 for part, m in zip(parts, messages, strict=True) if m["role"] == "assistant"
    )


def test_many_at_once(tokenizer):
    conversations = list(CONVERSATIONS.values())
    assert encode_chats(tokenizer, conversations) == [encode_chat(tokenizer, c) for c in conversations]
    assert encode_chats(tokenizer, []) == []


ANSWER = say("assistant", "a")


def test_a_prompt_may_begin_the_answer(tokenizer):
    conversations = [[say("user", "hi")], [say("system", "s"), *CONVERSATIONS["ends with a question"]]]
    start = "<think>\n\n</think>\nso "
    tools = [None, [{"name": "add"}]]
    for ids, messages, declared in zip(
        encode_started(tokenizer, conversations, start=start, tools=tools), conversations, tools, strict=True
    ):
        prompt, _ = encode_chat(tokenizer, messages, tools=declared, add_generation_prompt=True)
        tags = [tokenizer.token_id("<think>"), *tokenizer.encode("\n\n"), tokenizer.token_id("</think>")]
        assert ids == prompt + tags + tokenizer.encode("\nso ")


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "conversation is empty"),
        ({"role": "user"}, "must be a list of messages, not dict"),
        (None, "must be a list of messages, not NoneType"),
        (["hello"], "message 0 must be an object with role and content, not str"),
        (
            [ANSWER, say("human", "q")],
            "message 1 has the unknown role 'human'; allowed: system, user, assistant, tool",
        ),
        ([{"content": "q"}], "message 0 has the unknown role None"),
        ([say(["user"], "q")], "unknown role"),
        ([{"role": "user"}], "message 0 \\(user\\) has no content"),
        ([say("assistant", None)], "message 0 \\(assistant\\) has no content"),
        ([say("user", 3), ANSWER], "content of message 0 \\(user\\) must be a string, not int"),
        ([say("user", [{"type": "text"}]), ANSWER], "must be a string, not list"),
        ([say("user", "q"), say("system", "s")], "no assistant turn among 2 messages"),
        ([say("user", "q", tool_calls=[{}]), ANSWER], "only an assistant has"),
        ([say("user", "q", reasoning_content="r"), ANSWER], "only an assistant has"),
        ([say("assistant", "q", reasoning_content=3)], "reasoning_content of message 0 must be a string"),
        (
            [say("assistant", "q", tool_calls={"name": "f"})],
            "tool_calls of message 0 must be a list, not dict",
        ),
        ([say("assistant", "q", tool_calls=["f"])], "needs a name"),
        ([say("assistant", "q", tool_calls=[{"function": "f"}])], "needs a name"),
        ([say("assistant", "q", tool_calls=[{"name": "f"}])], "needs a name"),
        ([say("assistant", "q", tool_calls=[{"name": "f", "arguments": {1, 2}}])], "arguments .* not JSON"),
        ([say("assistant", "\ud83d")], "lone surrogate"),
    ],
)
def test_bad_conversations(tokenizer, messages, message):
    with pytest.raises(UserError, match=message):
        encode_chat(tokenizer, messages)
    if "surrogate" not in message:
        with pytest.raises(UserError, match=message):
            check_messages(messages)


def test_bad_options(tokenizer):
    with pytest.raises(UserError, match="train_on is 'first'; allowed: 'all', 'last'"):
        encode_chat(tokenizer, [ANSWER], train_on="first")
    with pytest.raises(UserError, match="empty"):
        encode_chat(tokenizer, [], add_generation_prompt=True)


def test_prompts_need_no_answer():
    check_messages([say("user", "q")], need_answer=False)


def foreign(corpus, path, names):
    """A tokenizer that has only ``names`` as its tokens."""
    spec = json.loads(train_bpe(corpus(), vocab_size=400).files["tokenizer.json"])
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in names]
    for token in [t for t in list(spec["model"]["vocab"]) if t.startswith("<") and t.endswith(">") and len(t) > 2]:
        if token not in names:
            spec["model"]["vocab"][f"unused{spec['model']['vocab'].pop(token)}"] = len(spec["model"]["vocab"]) + 50
    (path / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(path)


def test_a_tokenizer_without_chatml_says_what_it_lacks(corpus, tmp_path):
    plain = foreign(corpus, tmp_path, ["<|endoftext|>", "<|im_start|>"])
    assert plain.decode(plain.encode("fine 好")) == "fine 好"
    with pytest.raises(UserError, match=r"no chat template, and for plain ChatML it lacks <\|im_end\|>"):
        encode_chat(plain, [ANSWER])


def test_a_chatml_tokenizer_without_tags_keeps_them_as_text(corpus, tmp_path):
    qwen = foreign(corpus, tmp_path, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with pytest.warns(UserWarning, match="no chat template: conversations are written as plain ChatML"):
        ids, mask = encode_chat(qwen, [say("assistant", "<think>a</think>b")])
    assert ids == ids_by_hand(qwen, (START,), "assistant\n", "<think>a</think>b", (END,), "\n")
    assert sum(mask) == len(qwen.encode("<think>a</think>b")) + 1


TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "查一个词", "parameters": {}}}]


@pytest.mark.parametrize("messages", [CONVERSATIONS[name] for name in ("plain", "system", "late system", "empty")])
def test_tools_equal_transformers(tokenizer, theirs, messages):
    ids, mask = encode_chat(tokenizer, messages, tools=TOOLS)
    assert ids == theirs.apply_chat_template(messages, tools=TOOLS, return_dict=True)["input_ids"]
    without, mask_without = encode_chat(tokenizer, messages)
    assert ids != without
    assert sum(mask) == sum(mask_without)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\n")
    assert '<tools>\n{"type": "function", "function": {"name": "lookup", "description": "查一个词"' in text
    assert encode_chats(tokenizer, [messages, messages], tools=[None, TOOLS]) == [(without, mask_without), (ids, mask)]


@pytest.mark.parametrize(
    "tools, reason",
    [("f", "tools must be a list"), ([{}], "tool 0 needs a name"), ([{"name": "f", "x": {1}}], "tool 0 is not JSON")],
)
def test_bad_tools(tokenizer, tools, reason):
    with pytest.raises(UserError, match=reason):
        encode_chat(tokenizer, CONVERSATIONS["plain"], tools=tools)
