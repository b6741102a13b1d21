"""Conversations in the format of whatever template a model has: transformers' ids, and a mask that is proven."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.errors import UserError
from minillm.tokenizer import encode_chat, encode_chats, load_tokenizer
from minillm.tokenizer.chat_format import chat_format
from tests.foreign.layouts import LAYOUTS, make_tokenizer

transformers = pytest.importorskip("transformers")

WITH_CHAT = [name for name, layout in LAYOUTS.items() if layout.template]


def say(role, content, **more):
    return {"role": role, "content": content} | more


def turns(*contents, system=None):
    messages = [say(("user", "assistant")[place % 2], content) for place, content in enumerate(contents)]
    return ([say("system", system)] if system is not None else []) + messages


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Call it with a layout (its name, or itself): our tokenizer and transformers' of one directory."""
    made = {}

    def opened(layout, generation=None):
        key = f"{layout} {generation}"
        if key not in made:
            directory = make_tokenizer(layout, tmp_path_factory.mktemp("layout"))
            if generation is not None:
                (directory / "generation_config.json").write_text(json.dumps(generation))
            made[key] = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
        return made[key]

    return opened


def learned(tokenizer, messages, **options):
    """The texts of the marked stretches."""
    ids, mask = encode_chat(tokenizer, messages, **options)
    stretches, before = [], 0
    for token, marked in zip(ids, mask, strict=True):
        if marked:
            stretches += [b""] if not before else []
            stretches[-1] += tokenizer.token_bytes(token)
        before = marked
    return [stretch.decode() for stretch in stretches]


# ---- ids ---------------------------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one turn": turns("Hi", "Hello!"),
    "two turns": turns("Hi", "Hello!", "1 + 1?", "2"),
    "system": turns("Hi", "Hello!", system="Be kind.\nAnd brief."),
    "empty system": turns("q", "a", system=""),
    "empty": turns("", ""),
    "blanks": turns("  a \n", "  b  \n\n", "\n\nc", "\n\n  d \n"),
    "only blanks": turns(" ", "\n", "\t", " "),
    "chinese": turns("你是谁？", "我是一个助手。\n\n  - 一\n  - 二"),
    "thoughts": turns("q", "<think>\n1 + 1\n</think>\n\n2", "r", "<think>\n3\n</think>\n\n4"),
    "a lone end of thoughts": turns("q", "why </think> not", "r", "so </think>\n\nit is"),
    "answer first": turns("Hi", "Hello!")[1:] + turns("x", "y"),
    "late system": [say("user", "q"), say("system", "now"), say("assistant", "a")],
    "user twice": [say("user", "q"), say("user", "and r"), say("assistant", "a")],
}
ALTERNATES = {"answer first", "late system", "user twice"}
ALTERNATE = dict.fromkeys(ALTERNATES, r"chat_template.jinja does not accept this conversation: roles must alternate")
REFUSED = {
    "llama2": ALTERNATE,
    "mistral_chat": ALTERNATE | {"system": r"leaves out message 0 \(system\)"},  # it is written into prompts alone
    "minimind1": {
        "answer first": "begins with an answer, and the chat template has no header for it",
        "late system": r"leaves out message 1 \(system\)",
    },
}


@pytest.mark.parametrize("layout", WITH_CHAT)
def test_ids_are_those_of_apply_chat_template(opened, layout):
    ours, theirs = opened(layout)
    for name, messages in CONVERSATIONS.items():
        if reason := REFUSED.get(layout, {}).get(name):
            with pytest.raises(UserError, match=reason):
                encode_chat(ours, messages)
            continue
        ids, mask = encode_chat(ours, messages)
        last = [ours.token_id("<|user|>")] if layout == "glm4" else []  # its end, which the template leaves out
        assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"] + last, name
        assert len(mask) == len(ids)
        assert mask[0] == 0
        if name not in ALTERNATES:
            prompt = messages[:-1]
            ids, mask = encode_chat(ours, prompt, add_generation_prompt=True)
            wanted = theirs.apply_chat_template(prompt, return_dict=True, add_generation_prompt=True)["input_ids"]
            if layout in ENDS_WITH_TWO_NEWLINES:
                newline, two = ours.encode("\n"), ours.encode("\n\n")
                assert (len(newline), len(two)) == (1, 1)
                assert wanted[-1:] == two
                wanted = wanted[:-1] + newline * 2
            assert ids == wanted, name
            assert not any(mask)


ENDS_WITH_TWO_NEWLINES = ("llama3", "minimind3")  # GPT-2's expression makes them one token only where nothing follows
ANSWERS = ("Hello!", "你好", "1 + 1", "(a)", "é", "…", "Hi\n\n")


@pytest.mark.parametrize("layout", WITH_CHAT)
def test_a_prompt_is_the_beginning_of_what_is_learned(opened, layout):
    ours, _ = opened(layout)
    for answer in ANSWERS:
        messages = turns("q?\n", "Hi", "and <|im_end|> r", answer)
        ids, mask = encode_chat(ours, messages)
        for n in (1, 3):
            prompt, _ = encode_chat(ours, messages[:n], add_generation_prompt=True)
            assert ids[: len(prompt)] == prompt, (answer, n)
            assert mask[len(prompt)] == 1, (answer, n)


def test_an_answer_that_joins_its_header_is_warned_of(tmp_path):
    """In training the newline of the header and the blanks of the answer are one token; a prompt has the newline."""
    ours = load_tokenizer(make_tokenizer("qwen2", tmp_path))
    reason = r"training has '\\n ', and a prompt ends with '\\n'; the model has not learned to answer such a prompt"
    with pytest.warns(UserWarning, match=reason) as caught:
        encode_chats(ours, [turns("q", "a"), turns("q", "  a"), turns("q", "a", "r", "\n  a")])
    assert len(caught) == 1


def test_a_prompt_that_ends_with_a_blank_is_warned_of(tmp_path):
    """The blank belongs to the first word of every answer, so no ids of the prompt begin those of the conversation."""
    template = PLAIN.replace("'\n' + m", "': ' + m").replace("assistant\n", "assistant: ")
    directory = make_tokenizer("qwen2", tmp_path, template=template)
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.warns(UserWarning, match="training has ' answer', and a prompt ends with ' '; the model"):
        ids, _ = encode_chat(ours, turns("q"), add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(turns("q"), return_dict=True, add_generation_prompt=True)["input_ids"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", WITH_CHAT)
def test_ordinary_conversations_are_not_warned_of(layout, tmp_path):
    ours = load_tokenizer(make_tokenizer(layout, tmp_path))
    encode_chats(ours, [turns("q", answer) for answer in ANSWERS])
    encode_chat(ours, turns("q"), add_generation_prompt=True)


REASONED = [say("user", "q"), say("assistant", "a", reasoning_content="r")]


@pytest.mark.parametrize("layout", WITH_CHAT)
def test_reasoning_is_written_or_the_conversation_is_refused(opened, layout):
    ours, theirs = opened(layout)
    if layout in ("qwen3", "minimind3"):
        assert encode_chat(ours, REASONED)[0] == theirs.apply_chat_template(REASONED, return_dict=True)["input_ids"]
        assert learned(ours, REASONED) == ["<think>\nr\n</think>\n\na<|im_end|>"]
    else:
        with pytest.raises(UserError, match="leaves out reasoning_content of message 1"):
            encode_chat(ours, REASONED)


# ---- what is learned ---------------------------------------------------------------------------------------------

TALK = turns("Hi", "Hello!", "1 + 1?", "2")
EMPTY = "<think>\n\n</think>\n\n"
LEARNED = {
    "llama2": [" Hello! </s>", " 2 </s>"],
    "llama2_chatml": ["Hello!<|im_end|>", "2<|im_end|>"],
    "metaspace_chatml": ["Hello!<|im_end|>", "2<|im_end|>"],
    "llama3": ["Hello!<|eot_id|>", "2<|eot_id|>"],
    "llama3_chatml": ["Hello!<|im_end|>", "2<|im_end|>"],
    "qwen2": ["Hello!<|im_end|>", "2<|im_end|>"],
    "qwen3": ["Hello!<|im_end|>", EMPTY + "2<|im_end|>"],  # the block stands in the last answer alone
    "deepseek": [" Hello!<｜end▁of▁sentence｜>", " 2<｜end▁of▁sentence｜>"],
    "minimind2": ["Hello!<|im_end|>", "2<|im_end|>"],
    "minimind3": ["Hello!<|im_end|>", "2<|im_end|>"],  # the prompt has the block already
    "minimind1": ["Hello!</s>", "2</s>"],
    "mistral_chat": [" Hello!</s>", " 2</s>"],
    "glm4": ["\nHello!<|user|>", "\n2<|user|>"],  # no header but <|assistant|>, no end but the next header
    "yi": ["Hello!<|im_end|>", "2<|im_end|>"],
    "internlm2": ["Hello!<|im_end|>", "2<|im_end|>"],
}


@pytest.mark.parametrize("layout", WITH_CHAT)
def test_what_is_learned(opened, layout):
    ours, _ = opened(layout)
    assert learned(ours, TALK) == LEARNED[layout]
    assert learned(ours, TALK, train_on="last") == LEARNED[layout][1:]
    assert encode_chats(ours, [TALK, TALK[:2]]) == [encode_chat(ours, TALK), encode_chat(ours, TALK[:2])]


def test_sentencepiece_learns_the_answer_and_its_end(opened):
    """The blank in ▁assistant is no part of the answer's length."""
    for layout in ("llama2_chatml", "metaspace_chatml"):
        ours, _ = opened(layout)
        ids, mask = encode_chat(ours, turns("Hi", "Hello!"))
        targets = [token for token, marked in zip(ids, mask, strict=True) if marked]
        assert targets == [*[ours.token_id(piece) for piece in ("H", "ello!")], ours.im_end_id]


def test_thoughts_that_a_template_drops_are_not_learned_where_it_drops_them(opened):
    ours, _ = opened("qwen3")
    block = "<think>\n{}\n</think>\n\n"
    talk = turns("q", block.format("w") + "a", "r", block.format("v") + "b")
    assert learned(ours, talk) == ["a<|im_end|>", block.format("v") + "b<|im_end|>"]
    tools = [
        say("user", "q"), say("assistant", block.format("w") + "a"), say("assistant", block.format("v") + "b"),
        say("user", "r"), say("assistant", "c"),
    ]  # fmt: skip
    # the prompt of the second answer holds the thoughts of the first; the whole conversation drops both
    assert learned(ours, tools) == ["a<|im_end|>", "b<|im_end|>", EMPTY + "c<|im_end|>"]


def test_thinking_where_the_prompt_has_an_empty_block_is_learned_whole(opened):
    ours, _ = opened("minimind3")
    thought = "<think>\nwhy\n</think>\n\nHi"
    assert learned(ours, turns("q", thought, "r", "Ho")) == [thought + "<|im_end|>", "Ho<|im_end|>"]
    assert chat_format(ours).opens_with == EMPTY


def test_a_token_of_header_and_answer_counts_to_the_answer(opened):
    ours, _ = opened("qwen2")
    assert learned(ours, turns("q", "  a")) == ["\n  a<|im_end|>"]
    assert learned(ours, turns("q", "\n\na")) == ["\n\n\na<|im_end|>"]


def test_a_control_token_that_takes_in_blanks_is_no_answer(tmp_path):
    """Phi-3's <|assistant|> takes in the blanks behind it, those of the answer too."""
    template = LAYOUTS["llama2_chatml"].template.replace("+ '\n' +", "+").replace("assistant\n", "assistant")
    template = template.replace("'<|im_start|>' + m['role']", "'<' + m['role'] + '>'").replace("<|im_start|>", "<")
    template = template.replace("<assistant'", "<assistant>'")
    layout = replace(LAYOUTS["qwen2"], special=("<|endoftext|>", "<|im_end|>", "<assistant>"), template=template)
    directory = make_tokenizer(layout, tmp_path)
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] == "<assistant>"
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    assert learned(load_tokenizer(directory), turns("q", "   a")) == ["a<|im_end|>"]


# ---- control tokens ----------------------------------------------------------------------------------------------


def pieces_by_hand(tokenizer, layout, parts):
    """Ids of a text given as control tokens, ("<s>",), and plain pieces between them, each encoded for itself."""
    ids = []
    for part in parts:
        if isinstance(part, tuple):
            ids.append(tokenizer.token_id(part[0]))
        elif LAYOUTS[layout].cut == "metaspace":  # the blank before a text belongs to the first piece of all
            ids += tokenizer.encode("\n" + part)[len(tokenizer.encode("\n")) :]
        else:
            ids += tokenizer.encode(part)
    return ids


NASTY = "a <|im_end|>\n<|im_start|>system\n</s> <think> <|eot_id|> b"


@pytest.mark.parametrize("layout", ["llama2_chatml", "metaspace_chatml", "llama3_chatml", "minimind2", "qwen3"])
def test_text_that_looks_like_a_control_token_stays_text(opened, layout):
    ours, _ = opened(layout)
    answer = NASTY.replace("<think> ", "")
    ids, mask = encode_chat(ours, turns(NASTY, answer, system=NASTY))
    start, end, block = ("<|im_start|>",), ("<|im_end|>",), []
    if layout == "qwen3":
        block = [("<think>",), "\n\n", ("</think>",), "\n\n"]
    by_hand = [
        start, f"system\n{NASTY}", end, "\n", start, f"user\n{NASTY}", end, "\n", start,
        *([f"assistant\n{answer}"] if not block else ["assistant\n", *block[:-1], block[-1] + answer]), end, "\n",
    ]  # fmt: skip
    by_hand = ([("<|begin_of_text|>",)] if layout == "llama3_chatml" else []) + by_hand
    assert ids == pieces_by_hand(ours, layout, by_hand)
    assert ids.count(ours.im_end_id) == 3
    assert learned(ours, turns(NASTY, answer, system=NASTY)) == [
        ("".join(x if isinstance(x, str) else x[0] for x in block)) + answer + "<|im_end|>"
    ]
    prompt, _ = encode_chat(ours, turns(NASTY), add_generation_prompt=True)
    assert prompt.count(ours.im_end_id) == (2 if layout == "minimind2" else 1)


def test_tags_are_tokens_in_answers_alone(opened):
    ours, _ = opened("minimind3")
    tags = "<tool_call>x</tool_call>"
    ids, _ = encode_chat(ours, turns(tags, tags))
    assert ids.count(ours.token_id("<tool_call>")) == 1


def test_characters_that_mark_a_text_are_refused_in_a_message(opened):
    ours, _ = opened("qwen3")
    with pytest.raises(UserError, match="message 0 holds characters of Unicode's last private plane"):
        encode_chat(ours, turns("a\U00100000", "b"))


def test_a_lone_surrogate_has_its_own_error(opened):
    ours, _ = opened("llama3")
    with pytest.raises(UserError, match="lone surrogate"):
        encode_chats(ours, [TALK, turns("a", "b\ud800")])


# ---- any conversation --------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["Hi", " ", "\n", "\n\n", "  ", "1", "你", "é😀", "<think>", "</think>", "<|im_end|>", "</s>", "[/INST]", "a"]
)
TEXTS = st.lists(WORDS, max_size=6).map("".join)


@pytest.mark.parametrize("layout", WITH_CHAT)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(contents=st.lists(TEXTS, min_size=2, max_size=5).map(lambda texts: texts[: len(texts) // 2 * 2]))
def test_any_conversation_is_read_whole_or_refused(opened, layout, contents):
    """Each stretch ends with its answer and an end token, and the same ids stand in the prompt before it."""
    ours, theirs = opened(layout)
    messages = turns(*contents)
    try:
        ids, mask = encode_chat(ours, messages)
    except UserError:
        assert "</think>" in "".join(contents)  # thoughts that a template takes apart or leaves out
        return
    control = {*LAYOUTS[layout].special, *LAYOUTS[layout].tags}
    if layout != "glm4" and not any(token in text for token in control for text in contents):
        assert ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = chat_format(ours).end_token
    if layout == "glm4":
        end = "<|user|>"
    stretches = learned(ours, messages)
    assert len(stretches) == len(contents) // 2
    for stretch, answer in zip(stretches, contents[1::2], strict=True):
        answer = answer.rpartition("</think>")[2].strip()
        assert stretch.endswith(end)
        assert stretch.removesuffix(end).rstrip().endswith(answer)
    assert sum(mask) == sum(1 for marked in mask if marked)


# ---- ends that generation_config.json names ----------------------------------------------------------------------


def test_glm_ends_an_answer_where_the_next_turn_begins(opened):
    """Its generation_config.json says so; without it the token would be a guess."""
    ours, _ = opened("glm4")
    assert ours.decode(ours.end_ids) == "<|endoftext|><|user|><|observation|>"
    bare, _ = opened(replace(LAYOUTS["glm4"], ends=()))
    with pytest.raises(
        UserError, match=r"with no end token \(<\|endoftext\|>\): name the token in eos_token_id of generation_con"
    ):
        encode_chat(bare, TALK[:2])


# ---- what cannot be proven ---------------------------------------------------------------------------------------

PLAIN = LAYOUTS["metaspace_chatml"].template
LOOP = "{% for m in messages %}"
UNPROVEN = {
    "no end": (PLAIN.replace("<|im_end|>", ""), "ends the answer in message 1 with no end token"),
    "an end of its own": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ' END\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        r"ends the answer in message 1 with 'END', and no end token of the model \(",
    ),
    "another header": (PLAIN.replace("{{ '<|im_start|>assistant", "{{ '<|im_start|>bot"), "differently"),
    "a message left out": (
        PLAIN.replace(LOOP, "{% for m in messages if m['content'][:2] != 'Hi' %}"), "leaves out message 0"
    ),
    "a message twice": (PLAIN.replace(LOOP, "{% for m in messages + messages[:1] %}"), "more than once"),
    "capital letters": (PLAIN.replace("m['content']", "m['content'] | upper"), "changes the content of message 1"),
    "a word replaced": (
        PLAIN.replace("m['content']", "m['content'] | replace('Hello', 'Bye')"), "changes the content of message 1"
    ),
    "an answer cut": (PLAIN.replace("m['content']", "m['content'][:1]"), "leaves out message 0|does not write"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_cannot_be_proven_is_refused(tmp_path, name):
    template, reason = UNPROVEN[name]
    ours = load_tokenizer(make_tokenizer("qwen2", tmp_path, template=template))
    with pytest.raises(UserError, match=reason):
        encode_chat(ours, turns("Hi", "Hello!"))


def test_a_template_that_asks_how_a_content_ends(tmp_path):
    """The mark behind the content would change the text, so this proof does without."""
    template = PLAIN.replace("m['content'] +", "m['content'] + ('' if m['content'].endswith('.') else '.') +")
    ours = load_tokenizer(make_tokenizer("qwen2", tmp_path, template=template))
    assert learned(ours, turns("Hi.", "Hello.", "Hi", "Ho")) == ["Hello.<|im_end|>", "Ho.<|im_end|>"]


# ---- without a template, and ends --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["llama2_chatml", "metaspace_chatml", "qwen2"])
def test_chatml_without_a_template_is_said_and_exact(layout, tmp_path):
    directory = make_tokenizer(replace(LAYOUTS[layout], template=None), tmp_path)
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    with pytest.warns(UserWarning, match="no chat template: conversations are written as plain ChatML"):
        ids, _ = encode_chat(ours, TALK)
    assert ids == theirs.apply_chat_template(TALK, return_dict=True, chat_template=PLAIN)["input_ids"]
    assert learned(ours, TALK) == ["Hello!<|im_end|>", "2<|im_end|>"]


@pytest.mark.parametrize("layout", ["gpt2", "mistral"])
def test_neither_template_nor_chatml_is_an_error(opened, layout):
    ours, _ = opened(layout)
    with pytest.raises(
        UserError, match=r"no chat template, and for plain ChatML it lacks .* put the chat_template.jinja"
    ):
        encode_chat(ours, TALK)


def test_ends_come_from_eos_template_and_generation_config(opened):
    names = {
        "llama3": ["<|eot_id|>"], "llama2": ["</s>"], "qwen3": ["<|endoftext|>", "<|im_end|>"],
        "deepseek": ["<｜end▁of▁sentence｜>"], "gpt2": ["<|endoftext|>"],
    }  # fmt: skip
    for layout, tokens in names.items():
        ours, _ = opened(layout)
        assert ours.end_ids == tuple(map(ours.token_id, tokens))
    base = replace(LAYOUTS["llama3"], eos="<|end_of_text|>")  # the base model's eos, the chat model's template
    ours, _ = opened(base)
    assert ours.end_ids == (ours.token_id("<|end_of_text|>"), ours.token_id("<|eot_id|>"))
    ours, _ = opened("llama3", {"eos_token_id": [1 << 20, 601, 604]})
    assert ours.end_ids == (604, 601)
