"""Renders a model's chat template, with the same result as transformers' ``apply_chat_template``.

A template is a jinja program by the model's authors. It runs in a sandbox, with the same filters, globals and special
tokens as in transformers.
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
    """Return (file name, text) of the template in a tokenizer's files; None if there is none.

    ``chat_template.jinja`` has precedence over ``tokenizer_config.json``, as in transformers. Of several templates the
    one named "default" is used; UserError if none has that name.
    """
    if FILE in files:
        return f"{origin}/{FILE}", files[FILE]
    template = _settings(files).get("chat_template")
    if isinstance(template, list):  # older files have a list of names and texts
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
        raise UserError(f"chat_template in {origin}/{SETTINGS} is {type(template).__name__}, not a text: replace it")
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
                f"the chat template in {name} does not compile: {_one_line(error)}; correct or replace it"
            ) from None

    def render(
        self, messages: list[dict], *, tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Return the text of a conversation. Keys with the value None are dropped, as in transformers.

        ``tools`` are the JSON schemas of functions that the assistant may call.

        Raises:
            UserError: the template does not accept the conversation; with the template's own message.
        """
        messages = [_as_transformers_passes_it(message) for message in messages]
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as error:  # the template may raise anything
            raise UserError(
                f"the chat template in {self.name} does not accept this conversation: {_one_line(error)}"
            ) from None


def special_tokens(files: Mapping[str, str]) -> dict[str, str]:
    """Return the names and texts of the special tokens that a template may use, such as ``bos_token``."""
    settings = _settings(files)
    old_settings = json.loads(files.get("special_tokens_map.json", "{}"))
    tokens = {name: settings.get(name, old_settings.get(name)) for name in SPECIAL_TOKENS}
    extra = settings.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _settings(files: Mapping[str, str]) -> dict:
    return json.loads(files.get(SETTINGS, "{}"))


def _as_transformers_passes_it(message: dict) -> dict:
    message = {key: value for key, value in message.items() if value is not None}
    if "reasoning_content" in message:  # gpt-oss uses an older name
        message = {"thinking": message["reasoning_content"], **message}
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@functools.cache
def _process_time() -> datetime:
    """Return the time for templates: the same in the whole process, so that two renderings of a conversation agree."""
    return datetime.now()


def _environment():
    """Return the same sandbox as ``transformers.utils.chat_template_utils``, for which templates are written."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks an assistant's text for transformers' masks; here it changes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Unlike jinja's own filter it does not escape characters for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: _process_time().strftime(form)
    return environment
