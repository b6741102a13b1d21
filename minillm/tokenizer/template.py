"""A model's chat template, rendered as transformers renders it.

A template is a program in jinja, made by whoever made the model. It runs in a sandbox, with the filters, globals and
special tokens that ``apply_chat_template`` gives it, so the text is the same.
"""

import functools
import json
from collections.abc import Mapping
from datetime import datetime

from minillm.errors import UserError, missing_package

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def template_source(files: Mapping[str, str], origin: str) -> tuple[str, str] | None:
    """Return (name of its file, text) of the template in a tokenizer's files; None where there is none.

    ``chat_template.jinja`` comes before the entry of ``tokenizer_config.json``, as in transformers. Of several
    templates the one named "default" is taken; UserError where none has that name.
    """
    if FILE in files:
        return f"{origin}/{FILE}", files[FILE]
    template = _settings(files).get("chat_template")
    if isinstance(template, list):  # older files hold several, as a list of names and texts
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            names = ", ".join(map(str, template)) or "none"
            raise UserError(
                f"{origin}/{SETTINGS} has the chat templates {names} and no 'default': write the one to use into "
                f"{FILE} next to it"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"chat_template in {origin}/{SETTINGS} is {type(template).__name__}, not a text: rewrite it")
    return (f"{origin}/{SETTINGS}", template) if template else None


class ChatTemplate:
    """A compiled template.

    Raises:
        UserError: jinja2 is not installed, or the text is not a template.
    """

    def __init__(self, name: str, source: str, special_tokens: dict[str, str]):
        try:
            from jinja2.exceptions import TemplateError
        except ImportError:
            raise missing_package("jinja2", purpose=f"the chat template in {name}", extra="hub") from None
        self.name, self.source, self.special_tokens = name, source, special_tokens
        try:
            self._template = _environment().from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UserError(
                f"the chat template in {name} does not compile: {_one_line(error)}; mend or replace it"
            ) from None

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation. Keys with the value None are left out, as in transformers.

        Raises UserError with the template's own message where it does not accept the conversation.
        """
        messages = [_as_transformers_passes_it(message) for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # a foreign program: whatever it raises, it has no text for this conversation
            raise UserError(
                f"the chat template in {self.name} does not accept this conversation: {_one_line(error)}"
            ) from None


def special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Return the names and texts of the special tokens that a template may use, such as ``bos_token``."""
    settings = _settings(files)
    older = json.loads(files.get("special_tokens_map.json", "{}"))
    tokens = {name: settings.get(name, older.get(name)) for name in SPECIAL_TOKENS}
    extra = settings.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _settings(files: Mapping[str, str]) -> dict:
    return json.loads(files.get(SETTINGS, "{}"))


def _as_transformers_passes_it(message: dict) -> dict:
    message = {key: value for key, value in message.items() if value is not None}
    if "reasoning_content" in message:  # gpt-oss reads it under an older name
        message = {"thinking": message["reasoning_content"], **message}
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _started() -> datetime:
    """Return the time that templates see: one for the whole process, or two renderings of a conversation may differ."""
    return datetime.now()


def _environment():
    """Return the sandbox of ``transformers.utils.chat_template_utils``, which templates are written for."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant writes, for masks of their own; the text is the same."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # jinja's own filter escapes characters for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: _started().strftime(form)
    return environment
