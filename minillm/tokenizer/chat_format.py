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
    """The control token after the last answer; None if the template writes none."""


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
    return _probe_format(ChatTemplate(name, text, special_tokens(tokenizer.files)), spec)


def _probe_format(template: ChatTemplate, spec: dict) -> ChatFormat:
    """Return the format of a foreign template, from what it writes around a question and an answer."""
    question, answer = QUESTION[0]["content"], ANSWER[0]["content"]
    without_prompt, with_prompt = template.render(QUESTION), template.render(QUESTION, add_generation_prompt=True)
    _, opens_with = split_opening(with_prompt.rpartition(question)[2])
    header = ""
    if with_prompt.startswith(without_prompt):
        header = with_prompt.removeprefix(without_prompt).removesuffix(opens_with)
    after_answer = template.render(QUESTION + ANSWER).rpartition(answer)[2].lstrip()
    tokens = [token["content"] for token in spec.get("added_tokens", ())]
    end_tokens = [token for token in tokens if token and after_answer.startswith(token)]
    end_token = max(end_tokens, key=len, default=None)
    return ChatFormat(template=template, header=header, opens_with=opens_with, end_token=end_token)


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
