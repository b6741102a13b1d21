"""The prompts of a chat's model."""

import pytest

from minillm.data.reasoning import DIRECT
from minillm.inference.chat import ChatModel
from minillm.tokenizer import Tokenizer, encode_chat, train_bpe

QWEN = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QUESTION = {"role": "user", "content": "1+1"}
TALK = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}, QUESTION]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


def opening_with(tokenizer, opening):
    """Return the tokenizer with Qwen's template, which begins each answer with ``opening``."""
    pytest.importorskip("jinja2")
    template = QWEN.replace("assistant\\n' }}{% endif", f"assistant\\n{opening}' }}}}{{% endif")
    return Tokenizer(tokenizer.files | {"chat_template.jinja": template})


def prompt(tokenizer, messages, **options):
    return tokenizer.decode(ChatModel(model=None, tokenizer=tokenizer).encode(messages, **options))


def test_a_conversation(tokenizer):
    chat_model = ChatModel(model=None, tokenizer=tokenizer)
    tools = [{"name": "add"}]
    assert (
        chat_model.encode(TALK, tools=tools) == encode_chat(tokenizer, TALK, tools=tools, add_generation_prompt=True)[0]
    )
    assert (chat_model.opens_with, chat_model.direct_start) == ("", DIRECT)
    assert prompt(tokenizer, [QUESTION], start=DIRECT).endswith(f"<|im_start|>assistant\n{DIRECT}")


def test_a_text(tokenizer):
    chat_model = ChatModel(model=None, tokenizer=tokenizer, completes_text=True)
    assert chat_model.encode([QUESTION]) == [tokenizer.token_id("<|endoftext|>"), *tokenizer.encode("1+1")]
    assert chat_model.opens_with == ""


@pytest.mark.parametrize("opening", ["", "<think>\\n"])
def test_the_template_of_another_model(tokenizer, opening):
    foreign = opening_with(tokenizer, opening)
    opening = opening.replace("\\n", "\n")
    assert ChatModel(model=None, tokenizer=foreign).opens_with == opening
    assert prompt(foreign, TALK).endswith(
        f"assistant\n2<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n{opening}"
    )
    direct = "<think>\n\n</think>\n\n"
    assert prompt(foreign, [QUESTION], start=direct).endswith(f"1+1<|im_end|>\n<|im_start|>assistant\n{direct}")


def test_a_tokenizer_without_tags_cannot_begin_an_answer_so(tokenizer, monkeypatch):
    for missing, start in (("<think>", ""), ("<answer>", "<think>\n\n</think>\n\n")):
        monkeypatch.setattr(Tokenizer, "has_token", lambda self, name, missing=missing: name != missing)
        assert ChatModel(model=None, tokenizer=tokenizer).direct_start == start
