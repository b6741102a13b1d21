"""One form for all records: ``parse_record`` makes a ``Record`` of each form on the left. The keys tell the form.

    {"text"}                                                     -> "text"        text
    {"conversations" or "messages": turns}                       -> "chat"        messages
    {"conversation": [{"system", "instruction", "input", "output"}]} -> "chat"    messages
    {"conversation": [{"human", "assistant"}]}                   -> "chat"        messages
    {QUESTION, ANSWER}                                           -> "chat"        messages
    {"chosen", "rejected"}, two conversations                    -> "preference"  messages (shared), chosen, rejected
    {QUESTION or turns, "chosen", "rejected"}                    -> "preference"  messages (prompt), chosen, rejected
    {QUESTION, ANSWER, "label"} or {turns, "label"}              -> "judged"      messages (prompt), chosen, label

    turns     {"role", "content"}, {"from", "value"} (ShareGPT), and the other forms that ``messages.py`` reads
    QUESTION  "instruction" with "input" (Alpaca), "prompt", "query", "question", or "input" alone: a text
              ("prompt" may also be turns); "history", a list of [question, answer], may come before it
    ANSWER    "output", "completion", "response" or "answer": a text, or turns; "reasoning_content" may go with it
    "label"   true or false, 1 or 0; also as "kto_tag"; an object or a list is only a note
    "system"  or "system_prompt", with all forms except "text": a system turn at the beginning
    "tools"   or "functions", with all forms except "text": a list of the functions that the assistant may call

Nothing that changes the meaning is dropped. A record is refused, with the reason, if it has two contents that differ,
has images, or has a weight. Its other keys go to ``Record.extra``.
"""

import sys
from dataclasses import dataclass, field

from minillm.data.sources.columns import ANSWERS, CONVERSATIONS, QUESTIONS
from minillm.data.sources.messages import MEDIA, TOOLS, as_list, is_empty, normal_messages, normal_tools
from minillm.errors import UserError
from minillm.tokenizer.chat import check_messages

SCHEMAS = (
    "text; conversations; messages; conversation; instruction+output, prompt+completion, query+response, "
    "question+answer; prompt+chosen+rejected; chosen+rejected; each of them with label"
)
CONTEXTS = ("input", "history", "context", "choices", "options")  # keys that a question may refer to


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One usable record. ``kind`` decides which fields are set; see the table in the module's docstring."""

    kind: str
    line: int  # from 1: the line (jsonl, tables, first line of a txt document), index in an array, or row (parquet)
    text: str | None = None
    messages: list[dict] | None = None
    chosen: list[dict] | None = None
    rejected: list[dict] | None = None
    label: bool | None = None
    tools: list[dict] | None = None  # functions that the assistant may call, in OpenAI's form
    log_prob: float | None = None  # exact log-probability in nats, if the data's generator knows it
    extra: dict = field(default_factory=dict)  # all other keys of the record, untouched


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked: a text, or a conversation that waits for an answer."""

    content: str | list[dict]
    tools: list[dict] | None = None  # functions that the assistant may call, in OpenAI's form
    expected: str = ""  # the answer that the file expects

    @property
    def turns(self) -> list[dict]:
        """The conversation; a text is the only turn, the user's."""
        return [{"role": "user", "content": self.content}] if isinstance(self.content, str) else self.content

    @property
    def question(self) -> str:
        """The text, or that of the last turn."""
        return self.turns[-1].get("content") or ""


def parse_record(value: object, line: int) -> Record:
    """Return a JSON value as a ``Record``; UserError with the reason when it fits no schema or violates it."""
    fields, used_keys = _parse(_without_nulls(value), need_answer=True)
    for index, message in enumerate(fields.get("messages") or ()):
        has_more_than_content = any(message.get(key) for key in ("reasoning_content", "tool_calls"))
        if message["role"] == "assistant" and not has_more_than_content and not message["content"].strip():
            raise UserError(
                f"message {index} is an empty answer: the model would learn to answer nothing; leave the record out"
            )
    extra = {key: item for key, item in value.items() if key not in used_keys and key != "log_prob"}
    return Record(line=line, log_prob=_log_prob(value), extra=extra, **fields)


def parse_prompt(value: object) -> Prompt:
    """Return the part of a record before its last answer, with its tools.

    The answer may be missing. ``{"prompt"}`` and ``{"text"}`` alone give their text; any other record gives turns.
    """
    value = _without_nulls(value)
    fields, _ = _parse(value, need_answer=False)
    if fields["kind"] == "text":
        return Prompt(content=fields["text"])
    messages = fields["messages"]
    if fields["kind"] == "chat" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
        check_messages(messages, need_answer=False)
    is_plain = messages == [{"role": "user", "content": value.get("prompt")}]
    return Prompt(content=value["prompt"] if is_plain else messages, tools=fields.get("tools"))


# ---- from keys to a kind of record -----------------------------------------------------------------------


def _without_nulls(value: object) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"a JSON object is expected, not {type(value).__name__}")
    return {key: item for key, item in value.items() if item is not None}


def _parse(value: dict, *, need_answer: bool) -> tuple[dict, set[str]]:
    """Return the fields of ``Record``, and the keys of ``value`` that they come from."""
    _refuse_unsupported_keys(value)
    tools, tools_keys = _tools(value)
    label, label_keys = _label(value)
    if "chosen" in value or "rejected" in value:
        fields, content_keys = _preference(value)
        if label is not None:
            raise UserError("label next to chosen and rejected: a pair needs no label; leave it out")
    elif _has_turns(value):
        fields, content_keys = _chat(value, need_answer)
        if label is not None and need_answer:
            fields = _judged(fields["messages"], label)
    elif "text" in value:
        if tools:
            raise UserError("tools next to text: a text has no tools; give messages instead")
        return _text(value), {"text"}
    else:
        raise _fits_no_schema(value)
    _check_no_nul(fields)
    if tools:
        fields["tools"] = tools
    used_keys = label_keys | tools_keys | content_keys
    _check_unused_keys(value, used_keys, fields["messages"] + fields.get("chosen", []))
    return fields, used_keys


def _keys_in(value: dict, keys: tuple[str, ...]) -> list[str]:
    """Return those of ``keys`` that ``value`` has, in the order of ``keys``."""
    return [key for key in keys if key in value]


def _has_turns(value: dict) -> bool:
    """Return whether a record is a conversation. Next to a ``text``, an ``input`` without an answer is only a note."""
    keys = _keys_in(value, (*CONVERSATIONS, *QUESTIONS, "chosen"))
    if "text" in value and keys == ["input"] and not _keys_in(value, ANSWERS):
        return False
    return bool(keys)


def _refuse_unsupported_keys(value: dict) -> None:
    if value.get("weight", 1) != 1:
        raise UserError(f"a record has its own weight: {value['weight']!r}; all records count equally, leave it out")
    for key in _keys_in(value, MEDIA):
        belongs_to_content = _has_turns(value) or f"<{key.rstrip('s')}>" in str(value.get("text"))
        if belongs_to_content and not is_empty(value[key]):
            raise UserError(f"{key} in a record: the models read only text; leave such records out")


def _tools(value: dict) -> tuple[list[dict] | None, set[str]]:
    """Return the tools of a record and the keys that they come from."""
    conversation_keys = _keys_in(value, CONVERSATIONS)
    turns = as_list(value[conversation_keys[0]], conversation_keys[0]) if conversation_keys else None
    return normal_tools(value, turns), set(_keys_in(value, TOOLS))


def _label(value: dict) -> tuple[bool | None, set[str]]:
    """Return the label of a judged answer and its keys.

    The label of a text is only a note, such as its class, and so is a label that is an object or a list.
    """
    keys = [key for key in _keys_in(value, ("label", "kto_tag")) if not isinstance(value[key], (dict, list))]
    if not keys or not _has_turns(value):
        return None, set()
    for key in keys:
        if not isinstance(value[key], (bool, int, float)) or value[key] not in (0, 1):
            allowed = "allowed: true, false (give the key another name if it is a note)"
            raise UserError(f"{key} is neither good nor bad: it is {value[key]!r}; {allowed}")
    if len({bool(value[key]) for key in keys}) == 2:
        raise UserError("label and kto_tag differ: leave one of them out")
    return bool(value[keys[0]]), set(keys)


def _check_no_nul(fields: dict) -> None:
    messages = [message for key in ("messages", "chosen", "rejected") for message in fields.get(key) or ()]
    texts = [message.get(key) or "" for message in messages for key in ("content", "reasoning_content")]
    if any("\x00" in text for text in [*texts, fields.get("text") or ""]):
        raise UserError("a NUL character in the text: it is not text, or was read in a wrong encoding; remove it")


def _check_unused_keys(value: dict, used_keys: set[str], messages: list[dict]) -> None:
    """Raise UserError for an unused key that could be content of the record, unless it repeats the messages."""
    if used_keys & set(QUESTIONS):
        content_keys = (*QUESTIONS, *ANSWERS, *CONTEXTS)
    else:  # next to turns, an answer or the context of a question is only a note
        content_keys = QUESTIONS[:-1]
    for key in _keys_in(value, ("text", *CONVERSATIONS, *content_keys)):
        if key in used_keys or is_empty(value[key]) or _repeats_messages(value[key], messages):
            continue
        main_key = next(name for name in (*CONVERSATIONS, *QUESTIONS, "chosen") if name in used_keys)
        raise UserError(
            f"{key} next to {main_key}: their contents differ, and {key} would be lost; leave one of them out, or "
            f"choose with --columns {main_key}={main_key},…"
        )


def _repeats_messages(item, messages: list[dict]) -> bool:
    if isinstance(item, str):
        contents = [(message.get("content") or "").strip() for message in messages]
        # Line by line: a prompt with headings (Alpaca's "text") comes between an instruction and its input.
        return item.strip() in contents or all(line in item for text in contents for line in text.splitlines())
    try:
        turns = normal_messages(item)
    except UserError:
        return False
    return _comparable(turns) == _comparable(messages[: len(turns)])


def _fits_no_schema(value: dict) -> UserError:
    keys = ", ".join(map(str, value)) or "none has a value"
    list_keys = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    answer_keys = _keys_in(value, ANSWERS)
    if answer_keys:
        advice = f"{answer_keys[0]} has no question next to it"
    elif list_keys:
        key = list_keys[0]
        advice = f"{key} is a list: of turns? (--columns messages={key}); of records? (save only that list)"
    else:
        advice = "rename columns, e.g. --columns prompt=question,completion=answer"
    return UserError(f"the keys fit no schema: {keys}; {advice}; known: {SCHEMAS}")


# ---- the kinds -------------------------------------------------------------------------------------------


def _text(value: dict) -> dict:
    text = value["text"]
    if not isinstance(text, str):
        raise UserError(f"text must be a string, not {type(text).__name__}")
    if not text.strip():
        raise UserError("text is empty")
    for key in ("system", "system_prompt"):
        if not is_empty(value.get(key)):
            raise UserError(f"{key} next to text: a text has no system message; give messages instead")
    fields = {"kind": "text", "text": text}
    _check_no_nul(fields)
    return fields


def _chat(value: dict, need_answer: bool) -> tuple[dict, set[str]]:
    conversation_keys = _keys_in(value, CONVERSATIONS)
    if conversation_keys:
        messages, used_keys = _turns(value, conversation_keys[0])
    else:
        messages, used_keys = _question_and_answer(value, need_answer)
    messages, system_keys = _with_system(value, messages)
    check_messages(messages, need_answer=need_answer)
    return {"kind": "chat", "messages": messages}, used_keys | system_keys


def _question_and_answer(value: dict, need_answer: bool) -> tuple[list[dict], set[str]]:
    """Return the turns of a question and its answer, if there is one, and the keys that they come from."""
    prompt, question_keys = _question(value)
    answer_keys = _keys_in(value, ANSWERS)
    if answer_keys:
        key = answer_keys[0]
        reply, used_keys = _answer(value, key)
        prompt, replies = _separate_prompt(prompt, {key: reply})
        return prompt + replies[key], question_keys | used_keys
    if need_answer:
        key = _keys_in(value, QUESTIONS)[0]
        if "text" in value:
            raise UserError(f"text next to {key}: leave one of them out, or choose with --columns text=text")
        raise UserError(f"{key} has no answer next to it: name one, e.g. --columns {key}={key},output=THEIRS")
    return prompt, question_keys


def _preference(value: dict) -> tuple[dict, set[str]]:
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if side not in value:
            raise UserError(f"{other} without {side}: a preference needs both")
    replies = {side: _reply(value[side], side) for side in ("chosen", "rejected")}
    conversation_keys = _keys_in(value, CONVERSATIONS)
    if _keys_in(value, QUESTIONS):
        prompt, prompt_keys = _question(value)
    elif conversation_keys:
        prompt, prompt_keys = _turns(value, conversation_keys[0])
    else:
        if any(isinstance(value[side], str) for side in replies):
            raise UserError("chosen and rejected are strings without a prompt: add prompt, or give message lists")
        prompt, prompt_keys = replies["chosen"][:-1], set()
        if prompt != replies["rejected"][:-1]:
            raise UserError("chosen and rejected must share every message but the last")
        replies = {side: messages[-1:] for side, messages in replies.items()}
    if prompt_keys:
        check_messages(prompt, need_answer=False)
        prompt, replies = _separate_prompt(prompt, replies)
    prompt, system_keys = _with_system(value, prompt)
    _check_replies(prompt, replies)
    fields = {"kind": "preference", "messages": prompt, **replies}
    return fields, {"chosen", "rejected"} | prompt_keys | system_keys


def _judged(messages: list[dict], label: bool) -> dict:
    prompt, reply = messages[:-1], messages[-1:]
    _check_replies(prompt, {"the judged conversation": reply})
    return {"kind": "judged", "messages": prompt, "chosen": reply, "label": label}


def _log_prob(value: dict) -> float | None:
    log_prob = value.get("log_prob")
    if log_prob is None:
        return None
    is_number = isinstance(log_prob, (int, float)) and not isinstance(log_prob, bool)
    # JSON allows NaN, Infinity and integers of any size.
    if not is_number or not abs(log_prob) <= sys.float_info.max:
        raise UserError(f"log_prob is {log_prob!r}; a finite number of nats is expected")
    return float(log_prob)


# ---- parts of records ------------------------------------------------------------------------------------


def _turns(value: dict, key: str) -> tuple[list[dict], set[str]]:
    items = as_list(value[key], key)
    if key == "conversation" and isinstance(items[0], dict) and not {"role", "from"} & items[0].keys():
        return _input_output_turns(items), {key}
    return normal_messages(items), {key}


def _input_output_turns(items: list) -> list[dict]:
    """Return the turns of ``{"conversation": [{"system", "instruction", "input", "output"}]}``.

    ``input`` and ``output`` may also be called ``human`` and ``assistant``.
    """
    messages = []
    for index, turn in enumerate(items):
        is_object = isinstance(turn, dict)
        question_key, answer_key = ("human", "assistant") if is_object and "assistant" in turn else ("input", "output")
        if not is_object or answer_key not in turn:
            raise UserError(
                f"turn {index} of conversation must be an object with input and output, or human and assistant"
            )
        for key, item in turn.items():
            if key not in ("system", "instruction", question_key, answer_key) and not is_empty(item):
                raise UserError(f"an unknown key inside a turn: {key!r} of turn {index} would be lost; leave it out")
        question = _instruction(turn, question_key)
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        if question:
            messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": turn[answer_key]})
    return messages


def _instruction(value: dict, input_key: str = "input") -> str:
    parts = [value.get(key) or "" for key in ("instruction", input_key)]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"instruction and {input_key} must be strings")
    return "\n".join(filter(None, parts))


def _question(value: dict) -> tuple[list[dict], set[str]]:
    """Return the turns up to the answer, and the keys that they come from."""
    key = _keys_in(value, QUESTIONS)[0]
    if key == "instruction":
        question, used_keys = _instruction(value), {"instruction", "input", "history"}
    else:
        question, used_keys = value[key], {key, "history"}
    messages = _history(value)
    if key == "prompt" and isinstance(question, (list, dict)):
        messages += normal_messages(question if isinstance(question, list) else [question], "prompt")
    elif isinstance(question, str):
        messages.append({"role": "user", "content": question})
    else:
        raise UserError(f"{key} must be a string, not {type(question).__name__}")
    return messages, used_keys


def _history(value: dict) -> list[dict]:
    """Return the turns of ``{"history": [[question, answer], ...]}``; none without the key."""
    history = value.get("history")
    if is_empty(history):
        return []
    if isinstance(history, str):
        history = as_list(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of pairs [question, answer]")
    messages = []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _answer(value: dict, key: str) -> tuple[list[dict], set[str]]:
    reply, reasoning = _reply(value[key], key), value.get("reasoning_content")
    if is_empty(reasoning):
        return reply, {key}
    return [*reply[:-1], {**reply[-1], "reasoning_content": reasoning}], {key, "reasoning_content"}


def _reply(value, name: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, (list, dict)):
        raise UserError(f"{name} must be a string, a message or a list of messages, not {type(value).__name__}")
    return normal_messages(value if isinstance(value, list) else [value], name)


def _with_system(value: dict, messages: list[dict]) -> tuple[list[dict], set[str]]:
    """Return the messages with the record's system message first, and the keys that it comes from."""
    names = [name for name in ("system", "system_prompt") if not is_empty(value.get(name))]
    if not names:
        return messages, {"system", "system_prompt"} & value.keys()
    systems = {name: value[name] for name in names}
    for name, system in systems.items():
        if not isinstance(system, str):
            raise UserError(f"{name} must be a string: it is of type {type(system).__name__}; give its text alone")
    if messages and messages[0]["role"] == "system":
        systems["the first message"] = messages[0].get("content") or ""
        messages = messages[1:]
    if len({system.strip() for system in systems.values()}) > 1:
        raise UserError(f"two system messages that differ: {' and '.join(systems)}; leave one of them out")
    return [{"role": "system", "content": systems[names[0]]}, *messages], set(names)


def _separate_prompt(prompt: list[dict], replies: dict[str, list[dict]]) -> tuple[list[dict], dict]:
    """Return the prompt, and the replies without it: a reply may be the whole conversation, prompt included.

    The repeated part must certainly be the prompt: it ends with the prompt's turns, apart from white space around them,
    and an assistant turn follows. It may be longer than the prompt (a system message, earlier turns); then it becomes
    the prompt. All replies that repeat it must repeat the same turns.
    """
    if prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
        raise UserError("the prompt ends with an assistant turn: what follows would be a second answer; leave it out")
    prompt_lengths = {name: _repeated_lengths(prompt, reply) for name, reply in replies.items()}
    repeating = [
        name for name, reply in replies.items() if prompt_lengths[name] or reply[0]["role"] in ("user", "system")
    ]
    if not repeating:
        return prompt, replies
    first_reply = replies[repeating[0]]
    shared_lengths = [
        n
        for n in prompt_lengths[repeating[0]]
        if all(n in prompt_lengths[name] and replies[name][:n] == first_reply[:n] for name in repeating)
    ]
    if not shared_lengths or any(replies[name][0]["role"] == "assistant" for name in repeating):
        raise UserError(
            f"{' and '.join(repeating)} with turns before the reply that are not certainly those of the prompt: give "
            "only the reply, or the same whole conversation in each of them"
        )
    prompt_len = shared_lengths[-1]
    repeated_prompt = first_reply[:prompt_len]
    replies = {name: reply[prompt_len:] if name in repeating else reply for name, reply in replies.items()}
    if prompt[0]["role"] == "system" and repeated_prompt[0]["role"] != "system":
        repeated_prompt = [prompt[0], *repeated_prompt]
    return repeated_prompt, replies


def _repeated_lengths(prompt: list[dict], reply: list[dict]) -> list[int]:
    """Return every n such that the first n turns of ``reply`` end with ``prompt``, and an assistant turn follows."""
    prompt_turns, system_turn = _comparable(prompt), []
    if prompt_turns and prompt_turns[0][0] == "system":
        system_turn, prompt_turns = prompt_turns[:1], prompt_turns[1:]
    lengths = []
    for n in range(1, len(reply)):
        turns = _comparable(reply[:n])
        if system_turn and turns[0][0] == "system":
            if turns[:1] != system_turn:
                continue
            turns = turns[1:]
        if reply[n]["role"] == "assistant" and prompt_turns and turns[-len(prompt_turns) :] == prompt_turns:
            lengths.append(n)
    return lengths


def _comparable(messages: list[dict]) -> list[tuple]:
    """Return role, content without white space around it, and tool calls of each message, to compare messages."""
    turns = []
    for message in messages:
        content = message.get("content") or ""
        content = content.strip() if isinstance(content, str) else content
        turns.append((message["role"], content, message.get("tool_calls") or []))
    return turns


def _check_replies(prompt: list[dict], replies: dict[str, list[dict]]) -> None:
    if not prompt:
        raise UserError("there is no prompt before the reply: at least one message is needed")
    for name, reply in replies.items():
        check_messages([*prompt, *reply])
        if not reply or reply[-1]["role"] != "assistant":
            raise UserError(f"{name} must end with an assistant turn")
        if not (reply[-1].get("content") or "").strip() and not reply[-1].get("tool_calls"):
            raise UserError(f"{name} is an empty answer: there is nothing to compare")
    if replies.get("chosen") == replies.get("rejected", ()):
        raise UserError("chosen and rejected are equal: neither can be preferred")
