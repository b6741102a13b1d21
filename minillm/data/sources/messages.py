"""Converts the turns of a conversation from the forms of other projects into {"role", "content"} messages.

    {"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), mixed      -> {"role", "content"}
    content [{"type": "text", "text": "…"}]                                -> the texts joined
    "from": "function_call", value '{"name": …, "arguments": …}' (glaive)  -> assistant, tool_calls
    "function_call": {…} of an assistant (OpenAI, before tools)            -> tool_calls
    "from": "observation", "role": "function", …                           -> tool
    "system" in a user's turn                                              -> a system turn before it
    "tools" or "functions" in the first turn, a system turn (MiniMind)     -> the tools of the record

A turn with any other key is refused, and the message names the key: it might change the meaning of the turn. Keys that
change nothing (``NOTES``) are dropped.
"""

import json

from minillm.errors import UserError
from minillm.tokenizer.chat import ROLES, check_tools

CALL = "function call"
ROLE_NAMES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
    "function_call": CALL, "tool_call": CALL,
}  # fmt: skip
NOTES = ("id", "turn_id", "timestamp", "meta", "metadata", "source", "model", "lang", "language")
LOSS_KEYS = ("train", "trainable", "loss", "weight", "loss_weight")  # say whether a turn is a target
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TOOLS = ("tools", "functions")  # declare what an assistant may call
_TOOL_KEYS = ("name", "tool_call_id")
_ASSISTANT_KEYS = ("reasoning_content", "tool_calls")


def normal_messages(items, name: str = "the conversation") -> list[dict]:
    """Return turns as role/content messages. ``check_messages`` then checks that they form a conversation.

    Raises:
        UserError: not a list, or a turn with an unknown role, an unknown key, or content other than text.
    """
    messages: list[dict] = []
    for index, item in enumerate(as_list(items, name)):
        if not isinstance(item, dict):
            raise UserError(f"message {index} must be an object with role and content, not {type(item).__name__}")
        messages += _normal_turn(index, {key: value for key, value in item.items() if value is not None})
    return messages


def as_list(value, name: str) -> list:
    """Return ``value``, a list with at least one entry or the JSON text of one (as in tables), as a list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            advice = "write it with json.dumps (Python's own form with single quotes is not JSON)"
            raise UserError(f"{name} must be a list, not text: it is not valid JSON; {advice}") from None
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of at least one entry")
    return value


def is_empty(value) -> bool:
    """Return whether a value is empty: null, "", [], {}, or the JSON text of one of them."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value == [] or value == {}


def normal_tools(value: dict, items=None) -> list[dict] | None:
    """Return the tools that a record declares, each as ``{"type": "function", "function": {...}}``; None without any.

    They are under ``tools`` or ``functions`` of the record, or of the first of its turns, ``items``; as a list, or as
    the JSON text of one.

    Raises:
        UserError: not a list of functions with names, or declared twice with a difference.
    """
    first_turn = items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}
    declared = [source[key] for source in (value, first_turn) for key in TOOLS if not is_empty(source.get(key))]
    lists = [as_list(tools, "tools") for tools in declared]
    for tools in lists:
        check_tools(tools)
    normal = [
        [tool if tool.get("function") else {"type": "function", "function": tool} for tool in tools] for tools in lists
    ]
    if any(tools != normal[0] for tools in normal):
        raise UserError("tools are declared twice and differ: leave one of them out")
    return normal[0] if normal else None


def _normal_turn(index: int, item: dict) -> list[dict]:
    """Return the messages of one turn: one, or two if a user's turn carries the system message."""
    role_name = _value_under(index, item, "role", "from")
    if role_name is None:
        keys = ", ".join(map(str, item)) or "none"
        raise UserError(f"a turn without a role: message {index} has the keys {keys}; give role and content")
    role = ROLE_NAMES.get(role_name.strip().lower()) if isinstance(role_name, str) else None
    if role is None:
        allowed = ", ".join([*ROLES, *(name for name in ROLE_NAMES if name not in ROLES)])
        raise UserError(f"message {index} has the unknown role {role_name!r}; allowed: {allowed}")
    content = _value_under(index, item, "content", "value")
    other_keys = {key: value for key, value in item.items() if key not in ("role", "from", "content", "value", *NOTES)}
    if role == CALL:
        other_keys["tool_calls"] = _parse_calls(index, content)
        role, content = "assistant", ""
    if isinstance(content, list):
        content = _join_parts(index, content)
    message = {"role": role} | ({} if content is None else {"content": content})
    system_message = []
    for key, value in other_keys.items():
        if key == "reasoning_content" or (key in _TOOL_KEYS and role == "tool"):
            message[key] = value
        elif key == "tool_calls":
            if not isinstance(value, str):
                message["tool_calls"] = value
            elif not is_empty(value):
                message["tool_calls"] = _parse_calls(index, value)
        elif is_empty(value):
            continue
        elif key == "function_call" and role == "assistant":
            message["tool_calls"] = _parse_calls(index, value)
        elif key == "system" and role == "user":
            system_message = [{"role": "system", "content": value}]
        elif key in LOSS_KEYS:
            _check_loss_key(index, role, key, value)
        elif key in TOOLS and index == 0 and role == "system":
            continue  # ``normal_tools`` reads them
        else:
            raise _unknown_key(index, role, key)
    return [*system_message, message]


def _value_under(index: int, item: dict, key: str, other_key: str):
    """Return the value under either of two keys; UserError if both are there and differ."""
    if key in item and other_key in item and item[key] != item[other_key]:
        raise UserError(f"a turn has both {key} and {other_key}: message {index}; leave one of them out")
    return item.get(key, item.get(other_key))


def _join_parts(index: int, parts: list) -> str:
    """Return the text of a content that is a list of parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get("value")) if kind == "text" else None
        if not isinstance(text, str):
            raise UserError(
                f"a part of a turn is not text: message {index} has a part of type {kind!r}; allowed is "
                '{"type": "text", "text": "…"}, because the models read only text'
            )
        texts.append(text)
    return "".join(texts)


def _parse_calls(index: int, value) -> list[dict]:
    """Return tool calls that are written (by glaive, and in OpenAI's older form) as an object, a list, or JSON text."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function") or call if isinstance(call, dict) else {} for call in calls]
    if not calls or not all(isinstance(function, dict) and "name" in function for function in functions):
        form = '{"name": "…", "arguments": {…}}'
        raise UserError(f"a function call is not JSON with a name: message {index}; write {form}, or a list of these")
    return [
        {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments", {})}}
        for function in functions
    ]


def _check_loss_key(index: int, role: str, key: str, value) -> None:
    """Raise UserError when a turn's loss weight differs from ours: 1 for assistant turns, 0 for all others."""
    turn = f"message {index} ({role}) has {key} {json.dumps(value, default=str)}"
    if isinstance(value, str) or value not in (0, 1):
        raise UserError(f"a turn has its own weight: {turn}; allowed: 0 or false, 1 or true")
    if role == "assistant" and not value:
        raise UserError(
            f"a turn must not be a target: {turn}, but every assistant turn is one; end the conversation before it, or "
            "keep only the last turn as the answer and use --train_on last without this key"
        )
    if role != "assistant" and value:
        raise UserError(f"a turn must be a target: {turn}, but only assistant turns are; leave the key out")


def _unknown_key(index: int, role: str, key: str) -> UserError:
    if key in MEDIA:
        return UserError(f"{key} inside a turn: message {index} ({role}); the models read only text")
    if key in ("reasoning", "thinking", "thought"):
        advice = "rename it to reasoning_content"
    elif key in (*_TOOL_KEYS, *_ASSISTANT_KEYS):
        advice = f"only {'a tool' if key in _TOOL_KEYS else 'an assistant'} has it; leave it out"
    else:
        known_keys = "role, content, reasoning_content and tool_calls (assistant), name and tool_call_id (tool)"
        advice = f"known keys are {known_keys}; leave it out if it is a note"
    return UserError(f"an unknown key inside a turn: {key!r} of message {index} ({role}) would be lost; {advice}")
