"""Adds tokens and a chat template to a tokenizer, for base models that lack them."""

import json
import re
from importlib import resources
from pathlib import Path

from minillm.errors import UserError
from minillm.tokenizer.base import TAG_TOKENS, Tokenizer
from minillm.tokenizer.chat_format import CHATML_TOKENS
from minillm.tokenizer.template import FILE, ChatTemplate, special_tokens, template_source

CHATML = "chatml"
MAX_NAME = 64  # characters
NAME = re.compile(rf"\S{{1,{MAX_NAME}}}")


def token_names(text: str) -> list[str]:
    """Return the names in ``--add_tokens``, a list with commas; UserError for one that cannot be a token."""
    names = [name.strip() for name in text.split(",")] if text.strip() else []
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"--add_tokens {text!r}: {name!r} is not a name of a token; names have 1 to {MAX_NAME} characters, no "
                "blanks, and commas between them, e.g. '<|im_start|>,<|im_end|>'"
            )
    if len(set(names)) != len(names):
        raise UserError(f"--add_tokens {text!r}: a name stands there twice; leave one of them out")
    return names


def add_tokens(tokenizer: Tokenizer, names: list[str]) -> Tokenizer:
    """Return the tokenizer with further tokens, whose ids follow its others; itself if it has them all already.

    Tags such as ``<think>`` are ordinary output; all other names become special tokens, which no text of a message
    is encoded to. ``tokenizer.grown_from`` of the result is the tokenizer without them.

    Raises:
        UserError: the ids of the tokenizer have gaps, so the library would give other ids.
    """
    new_names = [name for name in names if not tokenizer.has_token(name)]
    if not new_names:
        return tokenizer
    spec = json.loads(tokenizer.files["tokenizer.json"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    entries = [
        {"id": tokenizer.vocab_size + number, "content": name, **flags, "special": name not in TAG_TOKENS}
        for number, name in enumerate(new_names)
    ]
    spec["added_tokens"] = [*(spec.get("added_tokens") or ()), *entries]
    files = tokenizer.files | {"tokenizer.json": json.dumps(spec, ensure_ascii=False)}
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    if isinstance(settings.get("added_tokens_decoder"), dict):  # transformers reads this copy of the entries, too
        copies = {str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in entries}
        settings["added_tokens_decoder"] |= copies
        files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    grown = _like(tokenizer, files)
    for entry in entries:
        if grown.token_id(entry["content"]) != entry["id"]:
            raise UserError(
                f"{tokenizer.origin} has ids without a token below {tokenizer.vocab_size}, so tokens cannot be added "
                "at its end: add them with the program that made it"
            )
    grown.grown_from = tokenizer
    return grown


def set_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """Return the tokenizer with another chat template.

    Args:
        template: "chatml", or the path of a jinja file.

    Raises:
        UserError: the file cannot be read, is no template, or ChatML's tokens are missing.
    """
    if template == CHATML:
        missing = [name for name in CHATML_TOKENS if not tokenizer.has_token(name)]
        if missing:
            raise UserError(
                f"--chat_template chatml: {tokenizer.origin} lacks {' and '.join(missing)}; add --add_tokens "
                f"'{','.join(missing)}'"
            )
        text = resources.files("minillm.tokenizer").joinpath(FILE).read_text(encoding="utf-8")
    else:
        try:
            text = Path(template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat_template {template}: cannot be read ({error}); give chatml, or a jinja file such as a "
                f"release's {FILE}"
            ) from None
        ChatTemplate(template, text, special_tokens(tokenizer.files))  # it must compile
    changed = _like(tokenizer, tokenizer.files | {FILE: text})
    changed.grown_from = tokenizer.grown_from
    return changed


def with_chat(tokenizer: Tokenizer, names: list[str], template: str = "") -> tuple[Tokenizer, list[str]]:
    """Return the tokenizer with tokens and a template, and a line for each change.

    Without ``template``, a tokenizer that gets ChatML's tokens and has no template gets ours.
    """
    grown, lines = add_tokens(tokenizer, names), []
    known = [name for name in names if tokenizer.has_token(name)]
    if known:
        lines.append(f"--add_tokens: {tokenizer.origin} has {', '.join(known)} already")
    if grown is not tokenizer:
        new_ids = [f"{name} = {grown.token_id(name)}" for name in names if name not in known]
        lines.append(f"--add_tokens: {', '.join(new_ids)}; their rows begin at the mean of the others")
    has_chatml = all(grown.has_token(name) for name in CHATML_TOKENS)
    if template:
        grown = set_template(grown, template)
        lines.append(f"--chat_template: conversations are written with {template}")
    elif names and has_chatml and template_source(tokenizer.files, tokenizer.origin) is None:
        grown = set_template(grown, CHATML)
        lines.append("conversations are written as ChatML, because the tokenizer has no chat template")
    return grown, lines


def _like(tokenizer: Tokenizer, files: dict[str, str]) -> Tokenizer:
    return Tokenizer(files, origin=tokenizer.origin, generation_ends=tokenizer.generation_ends)
