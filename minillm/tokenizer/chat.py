"""Conversations to ids, with the exact mask of what an assistant is to learn. Our format: ChatML.

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi!<|im_end|>\\n
    mask:                                                      1111111111111

A conversation is cut into segments first: single tokens and stretches of plain text. Each text is encoded
for itself, and since the tokenizer isolates newlines the result equals the encoding of the whole; so the
mask is exact by construction, there is no search for an answer in a list of ids.

Where a token may come from:
- ``<|im_start|> <|im_end|> <|endoftext|>``: from the format alone, never from content.
- ``<think> <answer> <tool_call> <tool_response>`` and their ends: from assistant content, and from the
  fields ``reasoning_content`` and ``tool_calls``, and around the content of a ``tool`` message.
Everywhere else their text stays text.

A model that comes with a chat template of its own speaks the format of that template: ``rendered_chat.py``.
"""

import json
import re
import warnings
from functools import lru_cache
from itertools import groupby

from minillm.errors import UserError
from minillm.tokenizer.base import TAG_TOKENS, Tokenizer
from minillm.tokenizer.chat_format import chat_format
from minillm.tokenizer.rendered_chat import encode_rendered
from minillm.tokenizer.template import template_source

ROLES = ("system", "user", "assistant", "tool")
_TAGS = re.compile("(" + "|".join(map(re.escape, TAG_TOKENS)) + ")")

# A segment is (text, is_token, is_trained).
Segment = tuple[str, bool, bool]


def encode_chat(
    tokenizer: Tokenizer, messages: list[dict], *, train_on: str = "all", add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and its answer mask (1: this token is to be predicted), of equal length.

    messages: dicts with ``role`` (system, user, assistant, tool) and ``content`` (a string); assistants may
        have ``reasoning_content`` (a string) and ``tool_calls`` (OpenAI's form, with or without
        ``function``), and then no content. Our format ignores other keys; a foreign template is given them. Several
        messages of one role in a row are allowed (tool results come so), and a system message may stand anywhere, as in
        transformers; a foreign template may refuse both.
    train_on: "all" marks every assistant turn, "last" the last one only. Marked are the content and the
        ``<|im_end|>`` behind it; not the header, and not the newline after the turn. For a foreign template see
        ``rendered_chat.py``.
    add_generation_prompt: end with an open assistant header; then no assistant turn is required. A prompt of a foreign
        template has no marks.

    Raises UserError for anything else, naming the message by its place (from 0).
    """
    return encode_chats(
        tokenizer, [messages], train_on=train_on, add_generation_prompt=add_generation_prompt
    )[0]


def encode_chats(
    tokenizer: Tokenizer,
    conversations: list[list[dict]],
    *,
    train_on: str = "all",
    add_generation_prompt: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """``encode_chat`` of each conversation; all texts are encoded in one parallel call."""
    if train_on not in ("all", "last"):
        raise UserError(f"train_on is {train_on!r}; allowed: 'all', 'last'")
    for messages in conversations:
        check_messages(messages, need_answer=not add_generation_prompt)
    options = {"train_on": train_on, "add_generation_prompt": add_generation_prompt}
    style = chat_format(tokenizer)
    _say_plain_chatml(tokenizer)
    if style.template is not None:
        return encode_rendered(tokenizer, conversations, **options)
    plans = [_segments(messages, **options) for messages in conversations]
    plans = [_split_unknown_tags(tokenizer, plan) for plan in plans]
    texts = {text: None for plan in plans for text, is_token, _ in plan if not is_token}
    ids_of = dict(zip(texts, tokenizer.encode_batch(list(texts)), strict=True))

    encoded = []
    for plan in plans:
        ids, mask = [], []
        for text, is_token, is_trained in plan:
            piece = [tokenizer.token_id(text)] if is_token else ids_of[text]
            ids += piece
            mask += [int(is_trained)] * len(piece)
        encoded.append((ids, mask))
    return encoded


def check_messages(messages, *, need_answer: bool = True) -> None:
    """Raise UserError unless ``messages`` is a conversation that ``encode_chat`` accepts.

    need_answer: at least one assistant turn is required (false for a prompt).
    """
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"a conversation must be a list of messages, not {_type(messages)}")
    if not messages:
        raise UserError("the conversation is empty: at least one message is needed")
    for place, message in enumerate(messages):
        _check_message(place, message)
    if need_answer and all(message["role"] != "assistant" for message in messages):
        raise UserError(
            f"no assistant turn among {len(messages)} messages: nothing to learn; add the answer, or "
            "leave out the record"
        )


def _type(value) -> str:
    return type(value).__name__


def _check_message(place: int, message) -> None:
    if not isinstance(message, dict):
        raise UserError(f"message {place} must be an object with role and content, not {_type(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"message {place} has the unknown role {role!r}; allowed: {', '.join(ROLES)}")
    content = message.get("content")
    calls = message.get("tool_calls")
    reasoning = message.get("reasoning_content")
    if content is None and not (role == "assistant" and calls):
        raise UserError(f"message {place} ({role}) has no content: give a string, which may be empty")
    if content is not None and not isinstance(content, str):
        raise UserError(f"content of message {place} ({role}) must be a string, not {_type(content)}")
    if role != "assistant" and (calls or reasoning):
        raise UserError(f"message {place} ({role}): only an assistant has reasoning_content or tool_calls")
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"reasoning_content of message {place} must be a string, not {_type(reasoning)}")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise UserError(f"tool_calls of message {place} must be a list, not {_type(calls)}")
    for call in calls or ():
        _check_call(place, call)


def _check_call(place: int, call) -> None:
    call = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise UserError(f"each of the tool_calls of message {place} needs a name (string) and arguments")
    try:
        json.dumps(call["arguments"])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the arguments of a tool call of message {place} are not JSON: {error}") from None


@lru_cache(maxsize=16)  # once for each tokenizer
def _say_plain_chatml(tokenizer: Tokenizer) -> None:
    if template_source(tokenizer.files, tokenizer.origin) is None:
        warnings.warn(
            f"{tokenizer.origin} has no chat template: conversations are written as plain ChatML", stacklevel=4
        )


def _segments(messages, *, train_on: str, add_generation_prompt: bool) -> list[Segment]:
    """The conversation as single tokens and plain texts, each with whether it is to be learned."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    trained = set(answers if train_on == "all" else answers[-1:])

    segments: list[Segment] = []
    for place, message in enumerate(messages):
        train = place in trained
        segments += [("<|im_start|>", True, False), (message["role"] + "\n", False, False)]
        segments += [(text, is_token, train) for text, is_token in _body(message)]
        segments += [("<|im_end|>", True, train), ("\n", False, False)]
    if add_generation_prompt:
        segments += [("<|im_start|>", True, False), ("assistant\n", False, False)]
    return _join_texts(segments)


def _body(message: dict) -> list[tuple[str, bool]]:
    """What stands between header and ``<|im_end|>``: (text, is_token) in order, as in chat_template.jinja."""
    content = message.get("content") or ""
    if message["role"] == "tool":
        return [("<tool_response>", True), ("\n" + content + "\n", False), ("</tool_response>", True)]
    if message["role"] != "assistant":
        return [(content, False)]
    body = []
    if message.get("reasoning_content"):
        body += [
            ("<think>", True),
            ("\n" + message["reasoning_content"] + "\n", False),
            ("</think>", True),
            ("\n", False),
        ]
    body += _split_tags(content)
    for n, call in enumerate(message.get("tool_calls") or ()):
        call = call.get("function") or call
        arguments = call["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        name = json.dumps(call["name"], ensure_ascii=False)
        body.append(("\n" if content or n else "", False))
        body += [
            ("<tool_call>", True),
            (f'\n{{"name": {name}, "arguments": {arguments}}}\n', False),
            ("</tool_call>", True),
        ]
    return body


def _split_tags(text: str) -> list[tuple[str, bool]]:
    # re.split with a group alternates: text, tag, text, tag, ..., text
    return [(part, bool(n % 2)) for n, part in enumerate(_TAGS.split(text))]


def _join_texts(segments: list[Segment]) -> list[Segment]:
    """Neighbouring texts of one kind become one: fewer to encode."""
    joined: list[Segment] = []
    for (is_token, is_trained), group in groupby(segments, key=lambda segment: segment[1:]):
        texts = [text for text, _, _ in group]
        joined += [(t, is_token, is_trained) for t in (texts if is_token else ["".join(texts)]) if t]
    return joined


def _split_unknown_tags(tokenizer: Tokenizer, plan: list[Segment]) -> list[Segment]:
    """A tokenizer that cuts text as ours do may lack some tags: there they are text."""
    if all(tokenizer.has_token(text) for text, is_token, _ in plan if is_token):
        return plan
    return _join_texts([(t, is_token and tokenizer.has_token(t), train) for t, is_token, train in plan])
