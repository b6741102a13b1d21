"""The turns of a conversation as other projects write them, in the one form that this library uses.

    {"role", "content"} (OpenAI), {"from", "value"} (ShareGPT), mixed      -> {"role", "content"}
    content [{"type": "text", "text": "…"}]                                -> the texts joined
    "from": "function_call", value '{"name": …, "arguments": …}' (glaive)  -> assistant, tool_calls
    "function_call": {…} of an assistant (OpenAI, before tools)            -> tool_calls
    "from": "observation", "role": "function", …                           -> tool
    "system" in a user's turn                                              -> a system turn before it

A turn's other keys are refused by name, for a key that is dropped may be one that changes what the turn means. Notes
that change nothing are left out: see ``NOTES``.
"""

import json

from minillm.errors import UserError
from minillm.tokenizer.chat import ROLES

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
TRAIN_KEYS = ("train", "trainable", "loss", "weight", "loss_weight")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_OF_TOOL = ("name", "tool_call_id")
_OF_ASSISTANT = ("reasoning_content", "tool_calls")


def normal_messages(items, name: str = "the conversation") -> list[dict]:
    """Return turns as role/content messages; ``check_messages`` says whether they are a conversation.

    Raises:
        UserError: it is not a list, or a turn has an unknown role, a key that would be lost, or parts other than text.
    """
    messages: list[dict] = []
    for place, item in enumerate(as_list(items, name)):
        if not isinstance(item, dict):
            raise UserError(f"message {place} must be an object with role and content, not {type(item).__name__}")
        messages += _one_turn(place, {key: value for key, value in item.items() if value is not None})
    return messages


def as_list(value, name: str) -> list:
    """Return a list that is not empty, also where it is written as JSON text (as tables have it)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            advice = "write it with json.dumps (Python's own form with single quotes is not JSON)"
            raise UserError(f"{name} must be a list, not text: as JSON it is broken; {advice}") from None
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of at least one entry")
    return value


def is_empty(value) -> bool:
    """Return whether a key with this value says nothing: null, "", [], {}, or the JSON text of one of them."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return value is None or value == [] or value == {}


def refuse_tools(tools) -> None:
    """Raise UserError when a record declares tools: the chat encoding has no place for their descriptions."""
    if not is_empty(tools):
        raise UserError(
            "tools are not supported: the chat encoding would leave their descriptions out; write them into the system "
            "message, or take the key tools out to learn the turns without them"
        )


def _one_turn(place: int, item: dict) -> list[dict]:
    role_name = _only_one(place, item, "role", "from")
    if role_name is None:
        keys = ", ".join(map(str, item)) or "none"
        raise UserError(f"a turn without a role: message {place} has the keys {keys}; give role and content")
    role = ROLE_NAMES.get(role_name.strip().lower()) if isinstance(role_name, str) else None
    if role is None:
        allowed = ", ".join([*ROLES, *(name for name in ROLE_NAMES if name not in ROLES)])
        raise UserError(f"message {place} has the unknown role {role_name!r}; allowed: {allowed}")
    content = _only_one(place, item, "content", "value")
    rest = {key: value for key, value in item.items() if key not in ("role", "from", "content", "value", *NOTES)}
    if role == CALL:
        rest["tool_calls"] = _calls(place, content)
        role, content = "assistant", ""
    if isinstance(content, list):
        content = _joined_parts(place, content)
    message = {"role": role} | ({} if content is None else {"content": content})
    before = []
    for key, value in rest.items():
        if (key in _OF_TOOL and role == "tool") or (key in _OF_ASSISTANT and key != "tool_calls"):
            message[key] = value
        elif key == "tool_calls":
            message |= _tool_calls(place, value)
        elif is_empty(value):
            continue
        elif key == "function_call" and role == "assistant":
            message["tool_calls"] = _calls(place, value)
        elif key == "system" and role == "user":
            before = [{"role": "system", "content": value}]
        elif key in TRAIN_KEYS:
            _check_wish(place, role, key, value)
        elif key == "tools":
            refuse_tools(value)
        else:
            raise _unknown_key(place, role, key)
    return [*before, message]


def _only_one(place: int, item: dict, key: str, other: str):
    """Return what is said under either of two names."""
    if key in item and other in item and item[key] != item[other]:
        raise UserError(f"a turn has both {key} and {other}: message {place}; leave one of them out")
    return item.get(key, item.get(other))


def _joined_parts(place: int, parts: list) -> str:
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get("value")) if kind == "text" else None
        if not isinstance(text, str):
            raise UserError(
                f"a part of a turn is not text: message {place} has a part of type {kind!r}; allowed is "
                '{"type": "text", "text": "…"}, for the models here read text alone'
            )
        texts.append(text)
    return "".join(texts)


def _tool_calls(place: int, value) -> dict:
    if isinstance(value, str):
        if is_empty(value):
            return {}
        value = _calls(place, value)
    return {"tool_calls": value}


def _calls(place: int, value) -> list[dict]:
    """Return the calls that glaive and OpenAI's older form write as one object, a list, or the JSON text of either."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    functions = [call.get("function") or call if isinstance(call, dict) else {} for call in calls]
    if not calls or not all(isinstance(function, dict) and "name" in function for function in functions):
        form = '{"name": "…", "arguments": {…}}'
        raise UserError(f"a function call is not JSON with a name: message {place}; write {form}, or a list of such")
    return [
        {"type": "function", "function": {"name": function["name"], "arguments": function.get("arguments", {})}}
        for function in functions
    ]


def _check_wish(place: int, role: str, key: str, value) -> None:
    """Every assistant turn is learned and no other: a turn that asks for something else is refused."""
    where = f"message {place} ({role}) has {key} {json.dumps(value, default=str)}"
    if isinstance(value, str) or value not in (0, 1):
        raise UserError(f"a turn has a weight of its own: {where}; allowed: 0 or false, 1 or true")
    if role == "assistant" and not value:
        raise UserError(
            f"a turn asks not to be learned: {where}, but every assistant turn is; end the conversation before it, or "
            "keep the last turn alone as the answer and use --train_on last without this key"
        )
    if role != "assistant" and value:
        raise UserError(f"a turn asks to be learned: {where}, but only assistant turns are; leave the key out")


def _unknown_key(place: int, role: str, key: str) -> UserError:
    if key in MEDIA:
        return UserError(f"{key} inside a turn: message {place} ({role}); the models here read text alone")
    if key in ("reasoning", "thinking", "thought"):
        advice = "rename it to reasoning_content"
    elif key in (*_OF_TOOL, *_OF_ASSISTANT):
        advice = f"only {'a tool' if key in _OF_TOOL else 'an assistant'} has it; leave it out"
    else:
        known = "role, content, reasoning_content and tool_calls (assistant), name and tool_call_id (tool)"
        advice = f"known are {known}; leave it out if it is a note"
    return UserError(f"an unknown key inside a turn: {key!r} of message {place} ({role}) would be lost; {advice}")
