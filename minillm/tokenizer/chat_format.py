"""Which format a tokenizer's conversations have: ours, or that of a foreign chat template.

Ours is plain ChatML, written down in ``chat.py`` for tokenizers that isolate newlines. Every other template is a
foreign one. It is a program, so it is asked, not parsed: a question and an answer are rendered, and what stands around
their words tells how an answer begins and ends. A tokenizer without a template that has ChatML's tokens is given our
template (``chat.py`` says so once).
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

# A tag about thinking, with which some templates open an answer: <think>, </think>, [THINK], ◁think▷, ...
_THINK_TAG = re.compile(r"[<\[◁][^<>\[\]◁▷\s]*think[^<>\[\]◁▷\s]*[>\]▷]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The format of a tokenizer's conversations; the default is plain ChatML, which is ours."""

    template: ChatTemplate | None = None
    """The foreign template that writes conversations; None: ``chat.py`` writes them."""
    header: str = "<|im_start|>assistant\n"
    """Text that the prompt of an answer ends with, before ``opens_with``; "" where it cannot be told apart."""
    opens_with: str = ""
    """Text of the answer itself that the prompt holds already, such as an empty think block."""
    end_token: str | None = "<|im_end|>"
    """The control token behind the last answer; None where the template ends it with no token."""


@lru_cache(maxsize=16)  # by the object: a Tokenizer never changes
def chat_format(tokenizer) -> ChatFormat:
    """Return the format of the conversations of a ``Tokenizer``.

    Raises:
        UserError: the tokenizer has neither a chat template nor ChatML's tokens; the template does not compile or
            cannot write a question and its answer; jinja2 is missing.
    """
    source = template_source(tokenizer.files, tokenizer.origin)
    missing = " and ".join(name for name in CHATML_TOKENS if not tokenizer.has_token(name))
    if source is None and missing:
        raise UserError(
            f"{tokenizer.origin} has no chat template, and for plain ChatML it lacks {missing}: put the "
            "chat_template.jinja of the model's chat version next to tokenizer.json, or take the chat version itself"
        )
    ours = resources.files("minillm.tokenizer").joinpath(FILE).read_text(encoding="utf-8")
    name, text = source or ("plain ChatML", ours)
    if text == ours and missing:
        raise UserError(f"{name} writes ChatML, and {tokenizer.origin} lacks {missing} as single tokens")
    spec = json.loads(tokenizer.files["tokenizer.json"])
    if text == ours and _isolates_newlines(spec):
        return ChatFormat()
    template = ChatTemplate(name, text, special_tokens(tokenizer.files))
    question, answer = QUESTION[0]["content"], ANSWER[0]["content"]
    closed, asked = template.render(QUESTION), template.render(QUESTION, add_generation_prompt=True)
    _, opens_with = split_opening(asked.rpartition(question)[2])
    header = asked.removeprefix(closed).removesuffix(opens_with) if asked.startswith(closed) else ""
    after = template.render(QUESTION + ANSWER).rpartition(answer)[2].lstrip()
    tokens = [token["content"] for token in spec.get("added_tokens", ())]
    end_token = max((token for token in tokens if token and after.startswith(token)), key=len, default=None)
    return ChatFormat(template=template, header=header, opens_with=opens_with, end_token=end_token)


def _isolates_newlines(spec: dict) -> bool:
    """Whether a tokenizer cuts text as ours do, at every newline, and changes nothing in it before."""
    cutter = spec.get("pre_tokenizer") or {}
    first = (cutter.get("pretokenizers") or [cutter])[0]
    pattern = (first.get("pattern") or {}).get("Regex", "")
    return not spec.get("normalizer") and first.get("behavior") == "Isolated" and pattern.startswith(r"\n|")


def split_opening(prompt: str) -> tuple[str, str]:
    """Return the end of a prompt as the header of the answer, and what it holds already of the answer's thinking."""
    tag = _THINK_TAG.search(prompt)
    return (prompt[: tag.start()], prompt[tag.start() :]) if tag else (prompt, "")
