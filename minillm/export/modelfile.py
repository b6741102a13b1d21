"""Writes a Modelfile, from which Ollama makes a model of a GGUF file.

Ollama has its own language for chat templates. A model whose template it does not have answers nonsense although its
weights are right. So a template is written only where it is proven: the model's own template renders conversations, and
the text must equal that of a known format, of which we know Ollama's spelling. Otherwise the file says that none is
there.
"""

import re
from pathlib import Path
from typing import NamedTuple

from minillm.errors import UserError
from minillm.hub.gguf_tokenizer import around_a_text
from minillm.hub.huggingface import read_generation
from minillm.tokenizer import Tokenizer
from minillm.tokenizer.template import ChatTemplate, special_tokens, template_source

QUESTION, ANSWER = {"role": "user", "content": "What is 2 + 2?\n\n如何？"}, {"role": "assistant", "content": "4。"}
SYSTEM = {"role": "system", "content": "Be brief.\nAnswer in one word."}
TWO_TURNS = [QUESTION, ANSWER, QUESTION]
PROBES = ([QUESTION], TWO_TURNS, [SYSTEM, QUESTION], [SYSTEM, *TWO_TURNS], [SYSTEM, QUESTION, ANSWER, *TWO_TURNS])
# Our names of settings in generation_config.json, and Ollama's.
PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
              "repetition_penalty": "repeat_penalty"}  # fmt: skip


class Format(NamedTuple):
    """A chat format: what stands around a message, and Ollama's template."""

    turn: str  # with {role} and {content}
    opening: str  # begins an answer
    template: str


FORMATS = (
    Format(
        "<|im_start|>{role}\n{content}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n",
    ),
    Format(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
)


def modelfile(gguf: Path, tokenizer: Tokenizer, model_dir: Path) -> tuple[str, str]:
    """Return the text of a Modelfile for the file ``gguf`` next to it, and a note about its template.

    Args:
        model_dir: has the ``generation_config.json``.
    """
    template, system, note = _template(tokenizer)
    lines = [f"FROM ./{gguf.name}"]
    lines += [f'TEMPLATE """{template}"""'] if template else [f"# {note}"]
    lines += [f'SYSTEM """{system}"""'] if system else []
    settings = read_generation(model_dir)
    for ours, theirs in PARAMETERS.items():
        if isinstance(settings.get(ours), int | float):
            lines.append(f"PARAMETER {theirs} {settings[ours]:g}")
    for token_id in tokenizer.end_ids:
        name = tokenizer.decode([token_id])
        lines.append(f'PARAMETER stop "{name}"')
    return "\n".join(lines) + "\n", note


def _template(tokenizer: Tokenizer) -> tuple[str, str, str]:
    """Return Ollama's template, the system message that the model's template adds (or ""), and a note."""
    source = template_source(tokenizer.files, tokenizer.origin)
    if source is None:
        return "", "", "this model has no chat template: Ollama passes a prompt on as it is"
    names = special_tokens(tokenizer.files)
    jinja = ChatTemplate(*source, names)
    adds_bos = around_a_text(tokenizer, [])["tokenizer.ggml.add_bos_token"]
    bos = names.get("bos_token", "") if adds_bos else ""  # then Ollama adds it
    for form in FORMATS:
        system = _default_system(jinja, form, bos)
        if system is not None:
            return form.template, system, "the chat template was translated and compared on conversations"
    return "", "", "this model's chat template has no proven translation: write a TEMPLATE by hand, or use llama-server"


def _default_system(jinja: ChatTemplate, form: Format, bos: str) -> str | None:
    """Return the system message of conversations without one; None if the template is not of this format."""
    default = ""
    head, tail = form.turn.replace("{role}", "system").split("{content}")
    try:
        text = jinja.render([QUESTION], add_generation_prompt=True).removeprefix(bos)
        if match := re.match(f"{re.escape(head)}(.*?){re.escape(tail)}", text, re.DOTALL):
            default = match[1]
        for messages in PROBES:
            has_system = messages[0]["role"] == "system" or not default
            turns = messages if has_system else [{"role": "system", "content": default}, *messages]
            expected = bos + "".join(form.turn.format(**message) for message in turns) + form.opening
            if jinja.render(messages, add_generation_prompt=True) != expected:
                return None
    except UserError:  # the template does not accept one of the conversations
        return None
    return default
