"""Tokenizer directories in the layouts of published models, made here in a second and without a download.

Each layout keeps what matters of the original: how text is cut, which tokens begin, end and pad, and what the chat
template does. The vocabularies are small and the templates are rewritten, so no file of a release is needed.

    from tests.foreign.layouts import LAYOUTS, make_tokenizer
    directory = make_tokenizer("llama2", tmp_path / "llama2")

Our own tokenizers have one token for bos, eos and pad, isolate newlines and speak plain ChatML. A fault that needs
bos != eos, no bos, pad = eos or a template with habits cannot show with them; it shows with one of these.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML
CHATML_WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Layout.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
# Qwen3's habits: the think block of an answer stands only behind the last question, older thoughts are dropped, content
# that carries a lone </think> is taken apart, and an open answer may begin with an empty block.
CHATML_THINKS_LAST = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set text = m['content'] %}{% set why = '' %}"
    "{% if m['reasoning_content'] is string %}{% set why = m['reasoning_content'] %}"
    "{% elif '</think>' in text %}"
    "{% set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or why) %}"
    "{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# MiniMind 3's: every answer thinks, and an open one begins with an empty block.
CHATML_THINKS_ALWAYS = (
    "{% for m in messages %}{% set text = m['content'] %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set why = '' %}"
    "{% if m['reasoning_content'] is string %}{% set why = m['reasoning_content'] %}"
    "{% elif '</think>' in text %}"
    "{% set why = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set told = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (told if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DEEPSEEK_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Mistral 7B Instruct: [INST] is a control token, and a system message is written only into a prompt.
MISTRAL_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (told if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# GLM-4: nothing ends a turn but the header of the next one, and the model writes the newline of its own header.
GLM4_CHAT = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# MiniMind 1: the header of an answer stands behind every question, whether it is a prompt or not.
MINIMIND1_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{{ '<s>system\n' + messages[0]['content'] + '</s>\n' }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<s>user\n' + m['content'] + '</s>\n<s>assistant\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '</s>\n' }}{% endif %}{% endfor %}"
)

SAMPLES = [
    "The quick brown fox has 12 apples and the lazy dog has 345.\n",
    "小明有三个苹果，小红有12个梨。他们一共有多少个水果？\n",
    "def add(a, b):\n    return a + b  # 加法\n\n",
    "Hi, hello! user system assistant think answer Hello!\n",
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What makes a published tokenizer unlike ours."""

    cut: str
    """bytes: GPT-2's byte level; split: byte level with the expression of Llama 3, which keeps newlines together;
    prepend: SentencePiece with a blank before every text (Llama 2's tokenizer.json);
    metaspace: the same as a pre-tokenizer, at the first piece of a text alone."""
    special: tuple[str, ...]
    """Control tokens, in the order of their ids; SentencePiece has them first, byte-level ones last."""
    bos: str | None
    eos: str
    pad: str | None = None
    template: str | None = None
    tags: tuple[str, ...] = ()
    """Added tokens that are not special, such as <think>."""
    adds_bos: bool = False
    """Whether tokenizer.json's post-processor puts bos before a text."""
    ends: tuple[str, ...] = ()
    """Tokens that eos_token_id of generation_config.json names; none: there is no such file."""
    more: dict = field(default_factory=dict)
    """Further entries of tokenizer_config.json."""


SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCEPIECE = ("<unk>", "<s>", "</s>")
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM4 = ("[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

LAYOUTS = {
    # SentencePiece: bos != eos, no pad
    "llama2": Layout(cut="prepend", special=SENTENCEPIECE, bos="<s>", eos="</s>", template=LLAMA2_CHAT, adds_bos=True),
    "mistral": Layout(cut="metaspace", special=SENTENCEPIECE, bos="<s>", eos="</s>", adds_bos=True),
    # SentencePiece with ChatML's tokens added, as many chat models on Llama 2 and Mistral have it
    "llama2_chatml": Layout(
        cut="prepend", special=(*SENTENCEPIECE, *CONTROL[1:]), bos="<s>", eos="</s>", template=CHATML, adds_bos=True
    ),
    "metaspace_chatml": Layout(
        cut="metaspace", special=(*SENTENCEPIECE, *CONTROL[1:]), bos="<s>", eos="<|im_end|>", pad="</s>",
        template=CHATML, adds_bos=True,
    ),
    # byte level, with a bos of its own; the template writes it
    "llama3": Layout(cut="bytes", special=LLAMA3, bos=LLAMA3[0], eos=LLAMA3[4], template=LLAMA3_CHAT, adds_bos=True),
    "llama3_chatml": Layout(
        cut="bytes", special=(*LLAMA3[:2], *CONTROL[1:]), bos=LLAMA3[0], eos="<|im_end|>", pad=LLAMA3[1],
        template=CHATML_WITH_BOS, adds_bos=True,
    ),
    # no bos at all
    "qwen2": Layout(
        cut="bytes", special=CONTROL, bos=None, eos="<|im_end|>", pad=CONTROL[0], template=CHATML_WITH_SYSTEM
    ),
    "qwen3": Layout(
        cut="bytes", special=CONTROL, bos=None, eos="<|im_end|>", pad=CONTROL[0], template=CHATML_THINKS_LAST,
        tags=THINK,
    ),
    # bos, eos and pad are one token, no template
    "gpt2": Layout(cut="bytes", special=CONTROL[:1], bos=CONTROL[0], eos=CONTROL[0], pad=CONTROL[0]),
    # pad = eos != bos, words instead of control tokens around the turns
    "deepseek": Layout(
        cut="bytes", special=DEEPSEEK, bos=DEEPSEEK[0], eos=DEEPSEEK[1], pad=DEEPSEEK[1], template=DEEPSEEK_CHAT
    ),
    # bos begins a turn, eos ends it, and the token that ends a document is the pad
    "minimind2": Layout(
        cut="bytes", special=CONTROL, bos="<|im_start|>", eos="<|im_end|>", pad=CONTROL[0], template=CHATML_WITH_SYSTEM
    ),
    "minimind3": Layout(
        cut="bytes", special=CONTROL, bos="<|im_start|>", eos="<|im_end|>", pad=CONTROL[0],
        template=CHATML_THINKS_ALWAYS, tags=THINK,
    ),
    "minimind1": Layout(
        cut="bytes", special=SENTENCEPIECE, bos="<s>", eos="</s>", pad="<unk>", template=MINIMIND1_CHAT
    ),
    # control tokens around questions, and a text of its own for a system message
    "mistral_chat": Layout(
        cut="metaspace", special=(*SENTENCEPIECE, "[INST]", "[/INST]"), bos="<s>", eos="</s>", template=MISTRAL_CHAT,
        adds_bos=True,
    ),
    # several ends, all named by generation_config.json; pad = eos, no bos
    "glm4": Layout(
        cut="bytes", special=("<|endoftext|>", *GLM4), bos=None, eos="<|endoftext|>", pad="<|endoftext|>",
        template=GLM4_CHAT, ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    # SentencePiece and ChatML, with a document's end that does not end a turn
    "yi": Layout(
        cut="prepend", special=("<unk>", "<|startoftext|>", *CONTROL), bos="<|startoftext|>", eos="<|im_end|>",
        pad="<unk>", template=CHATML,
    ),
    "internlm2": Layout(
        cut="prepend", special=(*SENTENCEPIECE, *CONTROL[1:]), bos="<s>", eos="</s>", pad="</s>",
        template=CHATML_WITH_BOS, ends=("</s>", "<|im_end|>"), adds_bos=True,
    ),
}  # fmt: skip
CHATML_LAYOUTS = [name for name, layout in LAYOUTS.items() if "<|im_start|>" in layout.special]


def sample_texts() -> Iterator[str]:
    """Yield enough different words for some 700 tokens."""
    syllables = ["ka", "mo", "ri", "te", "lun", "sa", "pe", "dor", "vi", "gan", *"山水火木金天地人日月"]
    for n in range(300):
        word = syllables[n % 10] + syllables[n // 10 % 10]
        name = syllables[10 + n % 10] + syllables[10 + n // 10 % 10]
        yield SAMPLES[n % len(SAMPLES)] + f"{n * 37} {word} {name}。\n"
        yield f"\n{' ' * (n % 6)}a\n\n{' ' * (n % 6)}b"  # tokens of newlines and blanks together


def make_tokenizer(layout: str | Layout, directory: Path, *, template: str | None = None, **settings) -> Path:
    """Write a tokenizer of that layout into ``directory``, as transformers would; return the directory.

    Args:
        template: another chat template than the layout's.
        settings: entries of tokenizer_config.json that replace the layout's.
    """
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    backend = (_byte_level if layout.cut in ("bytes", "split") else _sentencepiece)(layout)
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] not in layout.tags
    names = {"bos_token": layout.bos, "eos_token": layout.eos, "pad_token": layout.pad}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 4096,
        **names, **layout.more, **settings,
    }  # fmt: skip
    if "unk_token" not in config and "<unk>" in layout.special:
        config["unk_token"] = "<unk>"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    config = {name: value for name, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    if layout.ends:
        ends = {"eos_token_id": [backend.token_to_id(token) for token in layout.ends]}
        (directory / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    template = template or layout.template
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@functools.cache
def _trained_byte_level(cut: str) -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut == "split":
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(sample_texts(), trainer)
    return backend.to_str()


def _byte_level(layout: Layout) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(_trained_byte_level(layout.cut))
    backend.add_special_tokens(list(layout.special))
    backend.add_tokens(list(layout.tags))
    _add_bos(backend, layout)
    return backend


def _sentencepiece(layout: Layout) -> tokenizers.Tokenizer:
    """Pieces of characters with ▁ for blanks and bytes for the unknown, merged as the trainer of the library likes."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    learner.train_from_iterator(sample_texts(), trainers.BpeTrainer(vocab_size=400, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", layout.bos, layout.eos, *bytes_, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece not in ("\n",)]  # newlines are bytes there
    known = set(pieces)
    merges = [tuple(pair) for pair in learnt["merges"] if {*pair, "".join(pair)} <= known]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if layout.cut == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(list(layout.special))
    _add_bos(backend, layout)
    return backend


def _add_bos(backend: tokenizers.Tokenizer, layout: Layout) -> None:
    if layout.adds_bos:
        ids = [(layout.bos, backend.token_to_id(layout.bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{layout.bos} $A", special_tokens=ids)
