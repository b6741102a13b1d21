"""Tokenizers of MiniMind's two layouts: what ``tokenizers`` and transformers make of them, we make too."""

import json
import sys
import warnings

import pytest
import tokenizers

from minillm.errors import UserError
from minillm.tokenizer import encode_chat, load_tokenizer
from minillm.tokenizer.chat_format import ChatFormat, chat_format

# Written for this test, with the habits of the two: version 2 names an assistant before every conversation, version 3
# thinks in every answer, with nothing to say too.
TEMPLATES = {
    "v2": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe of use.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "v3": (
        "{% for m in messages %}{% set text = m.content %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% set why = '' %}"
        "{% if m.reasoning_content is string %}{% set why = m.reasoning_content %}"
        "{% elif '</think>' in text %}"
        "{% set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set text = text.split('</think>')[-1] %}{% endif %}"
        "{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
        "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{{ '<think>\n' if open_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
    ),
}
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
OPENS_WITH = {"v2": "", "v3": "<think>\n\n</think>\n\n"}


@pytest.fixture(scope="module", params=["v2", "v3"])
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def directory(layout, corpus, tmp_path_factory):
    """A tokenizer directory of that layout: GPT-2's pre-tokenizer, which does not isolate newlines."""
    path = tmp_path_factory.mktemp(layout)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = CONTROL + (["<|box_start|>", "<tts_pad>"] if layout == "v3" else [])
    tags = [*TAGS, "<|buffer1|>"] if layout == "v3" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + tags, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    blanks = [f"\n{' ' * n}a\n\n{' ' * n}b" for n in range(6)] * 40  # makes tokens of newlines and blanks together
    backend.train_from_iterator([*corpus(), *blanks], trainer)
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in special
    (path / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    settings = {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32768,
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATES[layout],
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def foreign(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


def test_the_vocabulary(foreign, layout):
    assert [foreign.token_id(token) for token in CONTROL] == [0, 1, 2]
    assert (foreign.eos_token_id, foreign.bos_token_id, foreign.pad_token_id, foreign.vocab_size) == (2, 1, 0, 700)
    assert (foreign.im_start_id, foreign.im_end_id) == (1, 2)
    assert foreign.has_token("<think>") == (layout == "v3")
    assert not foreign.has_token("<answer>")
    with pytest.raises(UserError, match="has no token '<answer>'"):
        foreign.token_id("<answer>")


def test_ids_equal_the_library_s(foreign, directory, sentences):
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = [*sentences, "", " ", "\n\n  a\n", "\ta\r\nb", "你好，hello 12345", "😀é", "<answer>no token</answer>"]
    for text in texts:
        ids = foreign.encode(text)
        assert ids == backend.encode(text).ids
        assert foreign.decode(ids) == text == backend.decode(ids)
    assert foreign.encode_batch(texts) == [foreign.encode(text) for text in texts]
    assert backend.encode("<|im_end|>").ids == [2]
    assert 2 not in foreign.encode("<|im_end|>")  # the text of a control token stays text
    assert foreign.decode([1, 2, *foreign.encode("a")], skip_special_tokens=True) == "a"


def test_the_format_of_the_template(foreign, layout):
    found = chat_format(foreign)
    assert (found.header, found.opens_with, found.end_token) == (
        "<|im_start|>assistant\n", OPENS_WITH[layout], "<|im_end|>",
    )  # fmt: skip
    assert found.template.source == TEMPLATES[layout]


def say(*contents, system=None, **more):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]
    turns[-1] |= more
    return ([{"role": "system", "content": system}] if system is not None else []) + turns


CONVERSATIONS = {
    "plain": say("Hello there", "Hi, I'm here!"),
    "system": say("q", "a", system="You are kind.\nAnd brief."),
    "empty system": say("q", "a", system=""),
    "late system": [*say("q"), {"role": "system", "content": "now"}, {"role": "assistant", "content": "a"}],
    "turns": say("1+1=?", "2", "and 12+30?", "42"),
    "ends with a question": say("a", "b", "c"),
    "blanks": say("  a \n", "  b  \n\n", "\n\n", "\t", " ", "   a"),
    "newlines first": say("\n a", "\n\n  b", "c", "\n\n\n"),
    "answer": say("q", "<answer>\n2\n</answer>"),
    "empty": say("", ""),
    "chinese": say("你是谁？", "我是一个助手。\n\n  - 一\n  - 二"),
    "thinks": say("q", "<think>\n1 + 1\n</think>\n\n<answer>\n2\n</answer>", "r", "<think>\n</think>x"),
    "thinks badly": say("q", "1 </think> 2 </think>\n 3", "r", "<think> 4"),
}
REASONING = {
    "reasoning": say("q", "\n2", reasoning_content="\n1 + 1\n"),
    "empty reasoning": say("q", "</think> 2", reasoning_content=""),
}


@pytest.mark.parametrize("name", [*CONVERSATIONS, *REASONING])
@pytest.mark.parametrize("open_turn", [False, True])
def test_conversations_equal_transformers(foreign, reference, layout, name, open_turn):
    messages = (CONVERSATIONS | REASONING)[name]
    if layout == "v2" and name == "reasoning" and not open_turn:
        with pytest.raises(UserError, match="the chat template leaves out reasoning_content of message 1"):
            encode_chat(foreign, messages)
        return
    wanted = reference.apply_chat_template(messages, return_dict=True, add_generation_prompt=open_turn)["input_ids"]
    ids, mask = encode_chat(foreign, messages, add_generation_prompt=open_turn)
    assert foreign.decode(ids) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=open_turn
    )
    if layout == "v3" and open_turn:  # its end, "\n\n", is cut as where an answer follows
        assert wanted[-1:] == foreign.encode("\n\n")
        wanted = wanted[:-1] + foreign.encode("\n") * 2
    assert ids == wanted
    assert len(mask) == len(ids)


def learned(foreign, messages, **options):
    ids, mask = encode_chat(foreign, messages, **options)
    return foreign.decode([token for token, marked in zip(ids, mask, strict=True) if marked])


def test_what_is_learned(foreign, layout):
    assert learned(foreign, say("q", "Hi", "r", "Ho")) == "Hi<|im_end|>Ho<|im_end|>"  # empty blocks are in the prompt
    assert learned(foreign, say("q", "Hi", "r", "Ho"), train_on="last") == "Ho<|im_end|>"
    thought = "<think>\nwhy\n</think>\n\nHi"
    assert learned(foreign, say("q", thought)) == thought + "<|im_end|>"
    # The newline of the header and the blanks of the answer are one token: it counts to the answer.
    header = "\n\n" if layout == "v3" else "\n"
    assert learned(foreign, say("q", "   Hi")) == f"{header}   Hi<|im_end|>"


def with_template(foreign, template, **files):
    settings = json.loads(foreign.files["tokenizer_config.json"]) | {"chat_template": template}
    return type(foreign)(foreign.files | {"tokenizer_config.json": json.dumps(settings)} | files)


PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no, never') }}", "does not accept this conversation: no, never"),
        ("{{", "tokenizer_config.json does not compile"),
        (PLAIN + "{{ bos_token.__class__.__mro__ }}", "does not accept this conversation"),  # the sandbox hides it
        ([{"name": "rag", "template": PLAIN}], "has the chat templates rag and no 'default'"),
        (7, "chat_template in .*tokenizer_config.json is int"),
    ],
)
def test_a_template_that_does_not_work_is_an_error(foreign, template, message):
    with pytest.raises(UserError, match=message):
        encode_chat(with_template(foreign, template), say("q", "a"))


def test_which_template_is_taken(foreign):
    for template in (TEMPLATES["v2"], [{"name": "default", "template": TEMPLATES["v2"]}], {"default": TEMPLATES["v2"]}):
        assert chat_format(with_template(foreign, template)).template.source == TEMPLATES["v2"]
    both = with_template(foreign, PLAIN, **{"chat_template.jinja": TEMPLATES["v3"]})
    assert chat_format(both).template.source == TEMPLATES["v3"]


def test_without_jinja2_the_package_is_named(foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setitem(sys.modules, "jinja2.exceptions", None)
    other = with_template(foreign, PLAIN + " ")
    assert other.end_ids == (2, 0)  # that of a document first; texts need no template
    with pytest.raises(UserError, match=r"needs the optional package 'jinja2'.*pip install jinja2"):
        encode_chat(other, say("q", "a"))


def test_our_own_tokenizers_are_plain_chatml(tokenizer, foreign):
    assert chat_format(tokenizer) == ChatFormat()
    bare = type(foreign)({"tokenizer.json": foreign.files["tokenizer.json"]})
    with pytest.warns(UserWarning, match="has no chat template: conversations are written as plain ChatML"):
        ids, _ = encode_chat(bare, say("q", "a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        assert encode_chat(bare, say("q", "a"))[0] == ids
    assert bare.decode(ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
