"""What a foreign chat template adds to plain ChatML, found by rendering it.

Templates of the ChatML kind differ in three habits: some put a system message of their own before a conversation that
has none (MiniMind 2, Qwen2.5), some write an empty ``<think>`` block into every answer that has no reasoning, and some
open the next answer with such a block (MiniMind 3 does both). A template is a program, so it is asked, not parsed:
short conversations are rendered, and what stands around their words is compared with plain ChatML. What follows no such
rule is taken for plain ChatML.
"""

import json
from dataclasses import dataclass
from functools import lru_cache

from minillm.tokenizer.base import Tokenizer

EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The habits of one template; the default is plain ChatML, which is ours."""

    default_system: str | None = None
    """Content of the system message before a conversation that begins with another role; None: no message."""
    always_thinks: bool = False
    """Every answer begins with a ``<think>`` block, which is empty where it has no reasoning."""
    opens_with: str = ""
    """Text that an open answer begins with."""


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Return the habits of the tokenizer's own template; plain ChatML where it has none."""
    return _probe(tokenizer.files.get("chat_template.jinja"), tokenizer.files.get("tokenizer_config.json", "{}"))


@lru_cache(maxsize=16)
def _probe(template: str | None, settings: str) -> ChatFormat:
    system, question, answer = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    reasoned = {"role": "assistant", "content": "\na", "reasoning_content": "\nr\n"}
    try:
        render = _compile(template, json.loads(settings))
        if render is None:
            return ChatFormat()
        asked = render([question])
        opened = render([question], add_generation_prompt=True)
        answered = render([system, question, answer, question, answer])
        thought = render([system, question, reasoned])
    except Exception:  # whatever a foreign program does wrong, plain ChatML is what we can still write
        return ChatFormat()
    default_system = None
    asking = _turn("user", "u")
    before, found, after = asked.partition(asking)
    start, end = _turn("system", "\0").split("\0")
    if found and not after and before.startswith(start) and before.endswith(end):
        inner = before[len(start) : -len(end)]
        default_system = None if "<|im_" in inner else inner
    told = _turn("system", "s")
    plain, thinking = (told + 2 * (asking + _turn("assistant", think + "a")) for think in ("", EMPTY_THINK))
    with_reason = told + asking + _turn("assistant", "<think>\nr\n</think>\n\na")
    always_thinks = (answered, thought) == (thinking, with_reason)
    if not always_thinks and answered != plain:
        return ChatFormat(default_system=default_system)
    header = "<|im_start|>assistant\n"
    rest = opened.removeprefix(asked)
    opens_with = rest.removeprefix(header) if opened.startswith(asked) and rest.startswith(header) else ""
    return ChatFormat(default_system=default_system, always_thinks=always_thinks, opens_with=opens_with)


def _turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def _compile(template: str | None, settings: dict):
    """Return a function that renders conversations as transformers does, in a sandbox; None: there is no template."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = template or settings.get("chat_template")
    if isinstance(template, list):  # older files hold several; transformers takes the one named "default"
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        return None

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(template)
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return lambda messages, **options: compiled.render(messages=messages, tools=None, **tokens, **options)
