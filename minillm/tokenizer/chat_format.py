"""Finds the format of a tokenizer's conversations: ours, or that of a model's own chat template.

Our format is plain ChatML, which ``chat.py`` writes for tokenizers that isolate newlines. Every other template is
called foreign. A template is a program, so it is not parsed: it renders a question and an answer, and the text around
them tells how an answer begins and ends. A tokenizer that has ChatML's tokens but no template gets our template, with a
warning in ``chat.py``.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from minillm.errors import UserError
from minillm.tokenizer.template import FILE, ChatTemplate, special_tokens, template_source

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
QUESTION = [{"role": "user", "content": "question"}]
ANSWER = [{"role": "assistant", "content": "answer"}]

# A tag for thinking, with which some templates begin an answer: <think>, </think>, [THINK], ◁think▷, ...
_THINK_TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*think[^<>\[\]◁▷\s]*[>\]▷]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The format of a tokenizer's conversations; the defaults are our plain ChatML."""

    template: ChatTemplate | None = None
    """The foreign template that writes conversations; None: ``chat.py`` writes them."""
    header: str = "<|im_start|>assistant\n"
    """Text at the end of a prompt, before ``opens_with``; "" if it cannot be separated from the question."""
    opens_with: str = ""
    """Beginning of the answer that the prompt already contains, such as an empty think block."""
    end_token: str | None = "<|im_end|>"
    """The control token that ends the last answer; None if the template writes none."""
    arguments: str = "any"
    """How the template takes the arguments of a tool call: as an "object", as JSON "text", or "any" of both."""


@lru_cache(maxsize=16)  # keyed by the object: a Tokenizer never changes
def chat_format(tokenizer) -> ChatFormat:
    """Return the format of the conversations of a ``Tokenizer``.

    Raises:
        UserError: the tokenizer has neither a chat template nor ChatML's tokens; the template does not compile or
            cannot write a question and its answer; jinja2 is missing.
    """
    source = template_source(tokenizer.files, tokenizer.origin)
    missing_tokens = " and ".join(name for name in CHATML_TOKENS if not tokenizer.has_token(name))
    if source is None and missing_tokens:
        raise UserError(
            f"{tokenizer.origin} has no chat template, and for plain ChatML it lacks {missing_tokens}: put the "
            "chat_template.jinja of the model's chat version next to tokenizer.json, or use the chat version itself"
        )
    our_template = resources.files("minillm.tokenizer").joinpath(FILE).read_text(encoding="utf-8")
    name, text = source or ("plain ChatML", our_template)
    if text == our_template and missing_tokens:
        raise UserError(f"{name} writes ChatML, but {tokenizer.origin} lacks {missing_tokens} as single tokens")
    spec = json.loads(tokenizer.files["tokenizer.json"])
    if text == our_template and _isolates_newlines(spec):
        return ChatFormat()
    tokens = {token["id"]: token["content"] for token in spec.get("added_tokens", ()) if token["content"]}
    names = special_tokens(tokenizer.files)
    known_ends = {names.get("eos_token"), *(tokens.get(token_id) for token_id in tokenizer.generation_ends)}
    return _probe_format(ChatTemplate(name, text, names), list(tokens.values()), known_ends)


def _probe_format(template: ChatTemplate, tokens: list[str], known_ends: set[str | None]) -> ChatFormat:
    """Return the format of a foreign template, from what it writes around a question and an answer.

    Args:
        tokens: the texts of the added tokens.
        known_ends: the ends that the model's files name.
    """
    question, answer = QUESTION[0]["content"], ANSWER[0]["content"]
    without_prompt, with_prompt = template.render(QUESTION), template.render(QUESTION, add_generation_prompt=True)
    _, opens_with = split_opening(with_prompt.rpartition(question)[2])
    header = ""
    if with_prompt.startswith(without_prompt):
        header = with_prompt.removeprefix(without_prompt).removesuffix(opens_with)
    after_answer = template.render(QUESTION + ANSWER).rpartition(answer)[2].lstrip()
    return ChatFormat(
        template=template,
        header=header,
        opens_with=opens_with,
        end_token=_end_token(after_answer, tokens, known_ends),
        arguments=_arguments_form(template),
    )


def _end_token(after_answer: str, tokens: list[str], known_ends: set[str | None]) -> str | None:
    """Return the control token that ends an answer.

    Some templates write several in a row, such as ``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>``. Then it is the one that
    the model's files name as an end, else the last.
    """
    written_tokens = []
    while begins := [token for token in tokens if after_answer.startswith(token)]:
        written_tokens.append(max(begins, key=len))
        after_answer = after_answer.removeprefix(written_tokens[-1])
    return next((token for token in written_tokens if token in known_ends), (written_tokens or [None])[-1])


def _arguments_form(template: ChatTemplate) -> str:
    """Return how a template takes the arguments of a tool call: "object", "text", or "any" of both.

    OpenAI's form of the arguments is JSON text; transformers' form is an object. A template may fail with one of them,
    write an object in Python's own form, or write text as JSON within JSON, which a model would learn unnoticed.
    """

    def rendered(arguments) -> str:
        call = {"type": "function", "function": {"name": "name", "arguments": arguments}}
        try:
            return template.render([*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except UserError:
            return ""

    with_object, with_text = rendered({"key": "value"}), rendered('{"key": "value"}')
    takes_object = bool(with_object) and "{'key'" not in with_object
    if not takes_object:
        return "text" if with_text else "any"
    return "any" if with_text == with_object else "object"


def _isolates_newlines(spec: dict) -> bool:
    """Return whether a tokenizer cuts text at every newline, as ours do, and does not change it before."""
    cutter = spec.get("pre_tokenizer") or {}
    first = (cutter.get("pretokenizers") or [cutter])[0]
    pattern = (first.get("pattern") or {}).get("Regex", "")
    return not spec.get("normalizer") and first.get("behavior") == "Isolated" and pattern.startswith(r"\n|")


def split_opening(prompt: str) -> tuple[str, str]:
    """Return the end of a prompt in two parts: the header of the answer, and the beginning of the answer's thinking."""
    tag = _THINK_TAG.search(prompt)
    return (prompt[: tag.start()], prompt[tag.start() :]) if tag else (prompt, "")
