"""Conversations to ids, with the exact mask of the tokens that are targets. Our format: ChatML.

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi!<|im_end|>\\n
    mask:                                                      1111111111111

A conversation is first cut into segments: single tokens and plain texts. Each text is encoded separately. Because the
tokenizer isolates newlines, the result equals the encoding of the whole conversation. So the mask is exact by
construction; there is no search for an answer in a list of ids.

Where a special token may come from:
- ``<|im_start|> <|im_end|> <|endoftext|>``: only from the format, never from content.
- ``<think> <answer> <tool_call> <tool_response>`` and their closing tags: from assistant content, from the fields
  ``reasoning_content`` and ``tool_calls``, and from the format around the content of a ``tool`` message.
Everywhere else their text stays text.

Models with another chat template use the format of that template: ``rendered_chat.py``.
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
    tokenizer: Tokenizer,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    train_on: str = "all",
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[int]]:
    """Return the ids of a conversation and its answer mask (1: this token is a target), of equal length.

    Args:
        messages: dicts with ``role`` (system, user, assistant, tool) and ``content`` (a string). Assistants may have
            ``reasoning_content`` (a string) and ``tool_calls`` (OpenAI's form, with or without ``function``), and then
            no content. Our format ignores other keys; a foreign template receives them. As in transformers, several
            messages of one role may follow each other (tool results do), and a system message may be at any position; a
            foreign template may refuse both.
        tools: the functions that the assistant may call, each a JSON schema in OpenAI's form. The template writes them
            before the conversation; ours writes them at the end of the first system message.
        train_on: "all" marks every assistant turn, "last" only the last one. The content and the ``<|im_end|>`` after
            it are marked, but not the header and not the newline after the turn. For foreign templates see
            ``rendered_chat.py``.
        add_generation_prompt: end with an open assistant header; then no assistant turn is required. With a foreign
            template the mask of a prompt is all 0.

    Raises:
        UserError: anything else; the message gives the index of the message (from 0).
    """
    options = {"train_on": train_on, "add_generation_prompt": add_generation_prompt}
    return encode_chats(tokenizer, [messages], tools=[tools], **options)[0]


def encode_chats(
    tokenizer: Tokenizer,
    conversations: list[list[dict]],
    *,
    tools: list[list[dict] | None] | None = None,
    train_on: str = "all",
    add_generation_prompt: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """Return ``encode_chat`` of each conversation with its tools; all texts are encoded in one parallel call."""
    if train_on not in ("all", "last"):
        raise UserError(f"train_on is {train_on!r}; allowed: 'all', 'last'")
    tools = [None] * len(conversations) if tools is None else tools
    for messages, declared_tools in zip(conversations, tools, strict=True):
        check_messages(messages, need_answer=not add_generation_prompt)
        check_tools(declared_tools)
    options = {"train_on": train_on, "add_generation_prompt": add_generation_prompt}
    style = chat_format(tokenizer)
    _warn_without_template(tokenizer)
    if style.template is not None:
        return encode_rendered(tokenizer, conversations, tools=tools, **options)
    segments_of = [_segments(*pair, **options) for pair in zip(conversations, tools, strict=True)]
    segments_of = [_unknown_tags_to_text(tokenizer, segments) for segments in segments_of]
    unique_texts = {text: None for segments in segments_of for text, is_token, _ in segments if not is_token}
    ids_of_text = dict(zip(unique_texts, tokenizer.encode_batch(list(unique_texts)), strict=True))

    encoded = []
    for segments in segments_of:
        ids, mask = [], []
        for text, is_token, is_trained in segments:
            segment_ids = [tokenizer.token_id(text)] if is_token else ids_of_text[text]
            ids += segment_ids
            mask += [int(is_trained)] * len(segment_ids)
        encoded.append((ids, mask))
    return encoded


def encode_started(
    tokenizer: Tokenizer,
    conversations: list[list[dict]],
    *,
    start: str,
    tools: list[list[dict] | None] | None = None,
) -> list[list[int]]:
    """Return the ids of a prompt for each conversation, with ``start`` as the beginning of the answer."""
    start_turn = {"role": "assistant", "content": start}
    turns = [[*messages, start_turn] for messages in conversations]
    encoded = encode_chats(tokenizer, turns, tools=tools, train_on="last")
    return [ids[: len(ids) - 1 - mask[::-1].index(1)] for ids, mask in encoded]  # up to the end token of the turn


def check_messages(messages, *, need_answer: bool = True) -> None:
    """Raise UserError unless ``messages`` is a conversation that ``encode_chat`` accepts.

    ``need_answer`` requires at least one assistant turn; it is false for a prompt.
    """
    if not isinstance(messages, (list, tuple)):
        raise UserError(f"a conversation must be a list of messages, not {_type(messages)}")
    if not messages:
        raise UserError("the conversation is empty: at least one message is needed")
    for index, message in enumerate(messages):
        _check_message(index, message)
    if need_answer and all(message["role"] != "assistant" for message in messages):
        raise UserError(
            f"no assistant turn among {len(messages)} messages: nothing to learn; add the answer, or leave the record "
            "out"
        )


def check_tools(tools) -> None:
    """Raise UserError unless ``tools`` is None or a list of functions in OpenAI's form."""
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise UserError(f"tools must be a list of functions, not {_type(tools)}")
    for number, tool in enumerate(tools or ()):
        function = (tool.get("function") or tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f'tool {number} needs a name: {{"type": "function", "function": {{"name": …}}}}')
        try:
            json.dumps(tool)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"tool {number} is not JSON: {error}") from None


def _type(value) -> str:
    return type(value).__name__


def _check_message(index: int, message) -> None:
    if not isinstance(message, dict):
        raise UserError(f"message {index} must be an object with role and content, not {_type(message)}")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"message {index} has the unknown role {role!r}; allowed: {', '.join(ROLES)}")
    content = message.get("content")
    calls = message.get("tool_calls")
    reasoning = message.get("reasoning_content")
    if content is None and not (role == "assistant" and calls):
        raise UserError(f"message {index} ({role}) has no content: give a string, which may be empty")
    if content is not None and not isinstance(content, str):
        raise UserError(f"content of message {index} ({role}) must be a string, not {_type(content)}")
    if role != "assistant" and (calls or reasoning):
        raise UserError(f"message {index} ({role}): only an assistant has reasoning_content or tool_calls")
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"reasoning_content of message {index} must be a string, not {_type(reasoning)}")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise UserError(f"tool_calls of message {index} must be a list, not {_type(calls)}")
    for call in calls or ():
        _check_call(index, call)


def _check_call(index: int, call) -> None:
    call = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise UserError(f"each of the tool_calls of message {index} needs a name (string) and arguments")
    try:
        json.dumps(call["arguments"])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the arguments of a tool call of message {index} are not JSON: {error}") from None


@lru_cache(maxsize=16)  # warns once for each tokenizer
def _warn_without_template(tokenizer: Tokenizer) -> None:
    if template_source(tokenizer.files, tokenizer.origin) is None:
        warnings.warn(
            f"{tokenizer.origin} has no chat template: conversations are written as plain ChatML", stacklevel=4
        )


def _segments(messages, tools, *, train_on: str, add_generation_prompt: bool) -> list[Segment]:
    """Return the conversation as single tokens and plain texts, each with whether it is a target."""
    if tools:
        messages = _with_tools(messages, tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained_answers = set(answers if train_on == "all" else answers[-1:])

    segments: list[Segment] = []
    for index, message in enumerate(messages):
        is_trained = index in trained_answers
        segments += [("<|im_start|>", True, False), (message["role"] + "\n", False, False)]
        segments += [(text, is_token, is_trained) for text, is_token in _body(message)]
        segments += [("<|im_end|>", True, is_trained), ("\n", False, False)]
    if add_generation_prompt:
        segments += [("<|im_start|>", True, False), ("assistant\n", False, False)]
    return _join_texts(segments)


def _with_tools(messages, tools) -> list[dict]:
    """Return the messages with the tools at the end of the first system message, as in chat_template.jinja."""
    schemas = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
    text = f"You may call these functions:\n<tools>\n{schemas}</tools>"
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = messages[0]["content"]
    return [{"role": "system", "content": f"{content}\n\n{text}" if content else text}, *messages[1:]]


def _body(message: dict) -> list[tuple[str, bool]]:
    """Return the part between header and ``<|im_end|>`` as (text, is_token), in order, as in chat_template.jinja."""
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
        if not isinstance(arguments, str):  # OpenAI's form is JSON text, transformers' form is an object
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
    """Join neighbouring texts of the same kind, so that fewer texts must be encoded."""
    joined: list[Segment] = []
    for (is_token, is_trained), group in groupby(segments, key=lambda segment: segment[1:]):
        texts = [text for text, _, _ in group]
        joined += [(t, is_token, is_trained) for t in (texts if is_token else ["".join(texts)]) if t]
    return joined


def _unknown_tags_to_text(tokenizer: Tokenizer, segments: list[Segment]) -> list[Segment]:
    """Turn tags into text that are not tokens of this tokenizer."""
    if all(tokenizer.has_token(text) for text, is_token, _ in segments if is_token):
        return segments
    return _join_texts(
        [(text, is_token and tokenizer.has_token(text), is_trained) for text, is_token, is_trained in segments]
    )
