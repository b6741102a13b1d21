"""One form for all records. They are told apart by their keys; everything on the left becomes a ``Record``:

    {"text"}                                                     -> "text"        text
    {"conversations" or "messages": turns}                       -> "chat"        messages
    {"conversation": [{"system", "instruction", "input", "output"}]} -> "chat"    messages
    {QUESTION, ANSWER}                                           -> "chat"        messages
    {"chosen", "rejected"}, two conversations                    -> "preference"  messages (shared), chosen, rejected
    {QUESTION or turns, "chosen", "rejected"}                    -> "preference"  messages (prompt), chosen, rejected
    {QUESTION, ANSWER, "label"} or {turns, "label"}              -> "judged"      messages (prompt), chosen, label

    turns     what ``messages.py`` reads: {"role", "content"}, {"from", "value"} (ShareGPT), and their relatives
    QUESTION  "instruction" with "input" (Alpaca), "prompt", "query", "question", or "input" alone; a text, or turns
              where it is "prompt"; before it "history", a list of [question, answer]
    ANSWER    "output", "completion", "response" or "answer": a text, or turns; "reasoning_content" before it
    "label"   true or false, 1 or 0; also as "kto_tag"
    "system"  or "system_prompt" with any of them but "text": a system turn at the head

Nothing that changes the meaning is dropped: a record that says one thing in two ways that differ, declares tools or
images, or has a weight, is refused with the reason. Other keys of a record are kept in ``extra``.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.sources.columns import ANSWERS, CONVERSATIONS, QUESTIONS, parse_columns, rename_columns
from minillm.data.sources.files import check_file, data_suffix, expand_paths, read_lines, read_raw
from minillm.data.sources.messages import MEDIA, as_list, is_empty, normal_messages, refuse_tools
from minillm.data.sources.rejects import publish_rejected, reject_line
from minillm.errors import UserError
from minillm.tokenizer.chat import check_messages

SCHEMAS = (
    "text; conversations; messages; conversation; instruction+output, prompt+completion, query+response, "
    "question+answer; prompt+chosen+rejected; chosen+rejected; each of them with label"
)
CONTEXTS = ("input", "history", "context", "choices", "options")  # what a question may need to be understood
TABLES = (".csv", ".tsv")
FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # as tables write them


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One usable record in normal form; which fields are set depends on ``kind`` (see the module's table)."""

    kind: str
    line: int  # 1-based: line (jsonl, tables, first line of a txt document), place in an array, row (parquet)
    text: str | None = None
    messages: list[dict] | None = None
    chosen: list[dict] | None = None
    rejected: list[dict] | None = None
    label: bool | None = None
    log_prob: float | None = None  # exact log-probability in nats, where the maker of the data knows it
    extra: dict = field(default_factory=dict)  # all other keys of the record, untouched


def read_records(
    path: str | Path | list,
    *,
    strict: bool = False,
    on_reject: Callable[[int, str, str], None] | None = None,
    columns: str = "",
) -> Iterator[Record]:
    """Return an iterator over the usable records of one or several files, in order, in bounded memory.

    Args:
        path: whatever ``expand_paths`` takes.
        strict: a bad line is fatal (``UserError`` that names it) instead of being set aside.
        on_reject: called with (line, reason, raw text) of each bad line. By default they are written to
            ``<path>.rejected.jsonl`` once the file is read.
        columns: the file's names for our keys, ``prompt=question,completion=answer``.

    Raises UserError at once for a missing, empty or unknown kind of file; at the end if no record was usable.
    """
    files = [check_file(file) for file in expand_paths(path)]
    if not files:
        raise UserError("no data file given: name at least one")
    names = parse_columns(columns)
    if on_reject is None:
        return (record for file in files for record in _read_and_publish(file, strict, names))
    return (record for file in files for record in _read(file, strict, on_reject, names))


def read_prompts(path: str | Path, *, columns: str = "") -> list[str | list[dict]]:
    """Return the prompts of a file: its lines that are not blank, or its records without their last answer.

    Lines are those of any file that is not one of records (``.txt``, ``.md``, no suffix); see ``parse_prompt``.

    Raises:
        UserError: the file cannot be read or holds no prompt; a record is bad (each one counts here).
    """
    prompts: list[str | list[dict]] = []
    names = parse_columns(columns)
    for file in expand_paths(path):
        if data_suffix(file) not in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
            prompts += [line for _, line in read_lines(file)]
            continue
        for line, _, value in read_raw(check_file(file)):
            try:
                prompts.append(parse_prompt(_named(value, names, data_suffix(file) in TABLES)))
            except UserError as error:
                raise UserError(f"{file}, line {line}: {error}") from None
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one per line")
    return prompts


def parse_record(value: object, line: int) -> Record:
    """Return the record in normal form; UserError with the reason when it fits no schema or breaks it."""
    fields, used = _parse(_without_nulls(value), need_answer=True)
    for place, message in enumerate(fields.get("messages") or ()):
        says_nothing = not any(message.get(key) for key in ("reasoning_content", "tool_calls"))
        if message["role"] == "assistant" and says_nothing and not message["content"].strip():
            raise UserError(f"message {place} is an empty answer: it would teach to say nothing; leave the record out")
    extra = {key: item for key, item in value.items() if key not in used and key != "log_prob"}
    return Record(line=line, log_prob=_log_prob(value), extra=extra, **fields)


def parse_prompt(value: object) -> str | list[dict]:
    """Return what comes before the last answer of a record: a text, or a conversation left open for an answer.

    Every record that ``parse_record`` takes has a prompt, and so has one that lacks the answer. ``{"prompt"}`` and
    ``{"text"}`` alone give their text as it is; any other record gives turns.
    """
    value = _without_nulls(value)
    fields, _ = _parse(value, need_answer=False)
    if fields["kind"] == "text":
        return fields["text"]
    messages = fields["messages"]
    if fields["kind"] == "chat" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
        check_messages(messages, need_answer=False)
    is_plain = messages == [{"role": "user", "content": value.get("prompt")}]
    return value["prompt"] if is_plain else messages


# ---- files -----------------------------------------------------------------------------------------------


def _read_and_publish(path: Path, strict: bool, columns: dict[str, str]) -> Iterator[Record]:
    rejected: list[str] = []
    finished = False  # a reader that stops early knows only some of the bad lines: it must not write them
    try:
        yield from _read(path, strict, lambda *bad: rejected.append(reject_line(*bad)), columns)
        finished = True
    except UserError:  # no usable record, or a strict reader (which has set nothing aside)
        finished = True
        raise
    finally:
        if finished and rejected:
            where = publish_rejected(path, rejected, fallback_dir=None)
            print(f"{path}: {len(rejected)} bad lines, see {where or 'nowhere (not writable)'}", file=sys.stderr)


def _read(path: Path, strict: bool, on_reject: Callable, columns: dict[str, str]) -> Iterator[Record]:
    n_usable = n_rejected = 0
    first_reason = ""
    is_table = data_suffix(path) in TABLES
    for line, raw, value in read_raw(path):
        try:
            record = parse_record(_named(value, columns, is_table), line)
        except UserError as error:
            if strict:
                raise UserError(f"{path}, line {line}: {error}") from None
            first_reason = first_reason or f"line {line}: {error}"
            n_rejected += 1
            raw = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
            on_reject(line, str(error), raw)
            continue
        n_usable += 1
        yield record
    if not n_usable:
        if n_rejected:
            raise UserError(f"{path} has no usable record: all {n_rejected} lines are bad; the first, {first_reason}")
        raise UserError(f"{path} is empty: give a file with at least one record")


def _named(value: object, columns: dict[str, str], is_table: bool) -> object:
    """Return a raw record under our names, with the cells of a table as the values that they write."""
    if isinstance(value, UserError):
        raise value
    if isinstance(value, dict):
        value = rename_columns(value, columns)
        if is_table:
            value = {key: _cell(key, item) for key, item in value.items()}
    return value


def _cell(key: str, text: str):
    if key in ("label", "kto_tag"):
        return FLAGS.get(text.strip().lower(), text)
    if key in ("log_prob", "weight"):
        try:
            return float(text) if text.strip() else None
        except ValueError:
            return text
    if key in ("chosen", "rejected", *QUESTIONS, *ANSWERS) and text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        turns = value if isinstance(value, list) else [value]
        if turns and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns):
            return value
    return text


# ---- from keys to a kind of record -----------------------------------------------------------------------


def _without_nulls(value: object) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"a JSON object is expected, not {type(value).__name__}")
    return {key: item for key, item in value.items() if item is not None}


def _parse(value: dict, *, need_answer: bool) -> tuple[dict, set[str]]:
    """Return the fields of Record, and the keys that went into them."""
    _refuse_what_would_be_lost(value)
    label, used = _label(value)
    if "chosen" in value or "rejected" in value:
        fields, more = _preference(value)
    elif _has_turns(value):
        fields, more = _chat(value, need_answer)
        if label is not None and need_answer:
            fields = _judged(fields["messages"], label)
    elif "text" in value:
        return _text(value), {"text"}
    else:
        raise _fits_no_schema(value)
    if label is not None and fields["kind"] == "preference":
        raise UserError("label next to chosen and rejected: a pair needs no label; leave it out")
    _check_no_nul(fields)
    used |= more
    _check_leftovers(value, used, fields["messages"] + fields.get("chosen", []))
    return fields, used


def _names_of(value: dict, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name in value]


def _has_turns(value: dict) -> bool:
    """Whether it is a conversation; next to a text, an ``input`` without an answer is a note."""
    names = _names_of(value, (*CONVERSATIONS, *QUESTIONS, "chosen"))
    return bool(names) and not ("text" in value and names == ["input"] and not _names_of(value, ANSWERS))


def _refuse_what_would_be_lost(value: dict) -> None:
    refuse_tools(value.get("tools"))
    refuse_tools(value.get("functions"))
    if value.get("weight", 1) != 1:
        raise UserError(f"a record has a weight of its own: {value['weight']!r}; all records count alike, leave it out")
    for key in _names_of(value, MEDIA):
        is_meant = _has_turns(value) or f"<{key.rstrip('s')}>" in str(value.get("text"))
        if is_meant and not is_empty(value[key]):
            raise UserError(f"{key} in a record: the models here read text alone; leave such records out")


def _label(value: dict) -> tuple[bool | None, set[str]]:
    names = _names_of(value, ("label", "kto_tag"))
    if not names or not _has_turns(value):
        return None, set()  # of a text: a note, such as its class
    for name in names:
        if not isinstance(value[name], (bool, int, float)) or value[name] not in (0, 1):
            allowed = "allowed: true, false (give the key another name if it is a note)"
            raise UserError(f"{name} says neither good nor bad: it is {value[name]!r}; {allowed}")
    if len({bool(value[name]) for name in names}) == 2:
        raise UserError("label and kto_tag differ: leave one of them out")
    return bool(value[names[0]]), set(names)


def _check_no_nul(fields: dict) -> None:
    messages = [message for key in ("messages", "chosen", "rejected") for message in fields.get(key) or ()]
    texts = [message.get(key) or "" for message in messages for key in ("content", "reasoning_content")]
    if any("\x00" in text for text in [*texts, fields.get("text") or ""]):
        raise UserError("a NUL character in the text: it is not text, or was read in a wrong encoding; take it out")


def _check_leftovers(value: dict, used: set[str], messages: list[dict]) -> None:
    """Raise UserError for keys that a record can be made of and that were not used, unless they repeat the messages."""
    contents = [(message.get("content") or "").strip() for message in messages]
    by_question = bool(used & set(QUESTIONS))  # next to turns, what belongs to a question or is an answer is a note
    names = (*QUESTIONS, *ANSWERS, *CONTEXTS) if by_question else QUESTIONS[:-1]
    for key in _names_of(value, ("text", *CONVERSATIONS, *names)):
        if key in used or is_empty(value[key]) or _repeats(value[key], messages, contents):
            continue
        main = next(name for name in (*CONVERSATIONS, *QUESTIONS, "chosen") if name in used)
        raise UserError(
            f"{key} next to {main}: they do not say the same, and {key} would be lost; leave one of them out, or "
            f"choose with --columns {main}={main},…"
        )


def _repeats(item, messages: list[dict], contents: list[str]) -> bool:
    if isinstance(item, str):
        return item.strip() in contents or all(content in item for content in contents)
    try:
        turns = normal_messages(item)
    except UserError:
        return False
    return _bare(turns) == _bare(messages[: len(turns)])


def _fits_no_schema(value: dict) -> UserError:
    keys = ", ".join(map(str, value)) or "none"
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    answers = _names_of(value, ANSWERS)
    if answers:
        advice = f"{answers[0]} has no question next to it"
    elif lists:
        advice = f"{lists[0]} is a list: of turns? (--columns messages={lists[0]}); of records? (save that list alone)"
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
    name = next((name for name in CONVERSATIONS if name in value), None)
    if name is not None:
        messages, used = _turns_of(value, name)
    else:
        messages, used = _question(value)
        answers = _names_of(value, ANSWERS)
        if need_answer and not answers:
            name = next(name for name in QUESTIONS if name in value)
            if "text" in value:
                raise UserError(f"text next to {name}: leave one of them out, or choose with --columns text=text")
            raise UserError(f"{name} has no answer next to it: name one, e.g. --columns {name}={name},output=THEIRS")
        if answers:
            reply, more = _answer(value, answers[0])
            messages, sides = _prompt_and_replies(messages, {answers[0]: reply})
            messages, used = messages + sides[answers[0]], used | more
    messages, more = _with_system(value, messages)
    check_messages(messages, need_answer=need_answer)
    return {"kind": "chat", "messages": messages}, used | more


def _preference(value: dict) -> tuple[dict, set[str]]:
    for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if side not in value:
            raise UserError(f"{other} without {side}: a preference needs both")
    sides = {side: _reply(value[side], side) for side in ("chosen", "rejected")}
    used = {"chosen", "rejected"}
    name = next((name for name in CONVERSATIONS if name in value), None)
    if _names_of(value, QUESTIONS):
        prompt, more = _question(value)
    elif name is not None:
        prompt, more = _turns_of(value, name)
    else:
        if any(isinstance(value[side], str) for side in sides):
            raise UserError("chosen and rejected are strings without a prompt: add prompt, or give message lists")
        prompt, more = sides["chosen"][:-1], set()
        if prompt != sides["rejected"][:-1]:
            raise UserError("chosen and rejected must share every message but the last")
        sides = {side: messages[-1:] for side, messages in sides.items()}
    if more:
        check_messages(prompt, need_answer=False)
        prompt, sides = _prompt_and_replies(prompt, sides)
    prompt, system = _with_system(value, prompt)
    _check_replies(prompt, sides)
    return {"kind": "preference", "messages": prompt, **sides}, used | more | system


def _judged(messages: list[dict], label: bool) -> dict:
    prompt, reply = messages[:-1], messages[-1:]
    _check_replies(prompt, {"the judged conversation": reply})
    return {"kind": "judged", "messages": prompt, "chosen": reply, "label": label}


def _log_prob(value: dict) -> float | None:
    log_prob = value.get("log_prob")
    if log_prob is None:
        return None
    is_number = isinstance(log_prob, (int, float)) and not isinstance(log_prob, bool)
    if not is_number or not abs(log_prob) <= sys.float_info.max:  # JSON has NaN, Infinity and integers of any size
        raise UserError(f"log_prob is {log_prob!r}; a finite number of nats is expected")
    return float(log_prob)


# ---- parts of records ------------------------------------------------------------------------------------


def _turns_of(value: dict, name: str) -> tuple[list[dict], set[str]]:
    items = as_list(value[name], name)
    by_pairs = name == "conversation" and isinstance(items[0], dict) and not {"role", "from"} & items[0].keys()
    return (_pairs(items) if by_pairs else normal_messages(items)), {name}


def _pairs(items: list) -> list[dict]:
    """Return the turns of ``{"conversation": [{"system", "instruction", "input", "output"}]}``."""
    messages = []
    for place, turn in enumerate(items):
        if not isinstance(turn, dict) or "output" not in turn:
            raise UserError(f"turn {place} of conversation must be an object with input and output")
        unknown = [key for key in turn if key not in ("system", "instruction", "input", "output")]
        lost = next((key for key in unknown if not is_empty(turn[key])), None)
        if lost is not None:
            raise UserError(f"an unknown key inside a turn: {lost!r} of turn {place} would be lost; leave it out")
        question = _instruction(turn)
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        if question:
            messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": turn["output"]})
    return messages


def _instruction(value: dict) -> str:
    parts = [value.get(key) or "" for key in ("instruction", "input")]
    if not all(isinstance(part, str) for part in parts):
        raise UserError("instruction and input must be strings")
    return "\n".join(filter(None, parts))


def _question(value: dict) -> tuple[list[dict], set[str]]:
    """Return the turns up to the answer, and the keys that they come from."""
    name = next(name for name in QUESTIONS if name in value)
    if name == "instruction":
        asked, used = _instruction(value), {"instruction", "input", "history"}
    else:
        asked, used = value[name], {name, "history"}
    history = value.get("history")
    history = [] if is_empty(history) else as_list(history, "history") if isinstance(history, str) else history
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError("history must be a list of pairs [question, answer]")
    messages = []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if name == "prompt" and isinstance(asked, (list, dict)):
        messages += normal_messages(asked if isinstance(asked, list) else [asked], "prompt")
    elif isinstance(asked, str):
        messages.append({"role": "user", "content": asked})
    else:
        raise UserError(f"{name} must be a string, not {type(asked).__name__}")
    return messages, used


def _answer(value: dict, name: str) -> tuple[list[dict], set[str]]:
    reply, reasoning = _reply(value[name], name), value.get("reasoning_content")
    if is_empty(reasoning):
        return reply, {name}
    return [*reply[:-1], {**reply[-1], "reasoning_content": reasoning}], {name, "reasoning_content"}


def _reply(value, name: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, (list, dict)):
        raise UserError(f"{name} must be a string, a message or a list of messages, not {type(value).__name__}")
    return normal_messages(value if isinstance(value, list) else [value], name)


def _with_system(value: dict, messages: list[dict]) -> tuple[list[dict], set[str]]:
    """Return the messages with the record's system message at the head, and the keys that it stands under."""
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


def _prompt_and_replies(prompt: list[dict], sides: dict[str, list[dict]]) -> tuple[list[dict], dict]:
    """Return the prompt and the replies alone, where the replies may repeat the prompt at their head.

    The repeated part must be the same conversation for certain: it ends with the prompt's turns, up to blanks around
    them, and then an assistant speaks. It may have more than the prompt: a system message, turns before. Then it is
    the prompt. The sides that repeat it must do so alike.
    """
    if prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
        raise UserError("the prompt ends with an assistant turn: what follows would be a second answer; leave it out")
    lengths = {name: _heads(prompt, side) for name, side in sides.items()}
    names = [name for name, side in sides.items() if lengths[name] or side[0]["role"] in ("user", "system")]
    if not names:
        return prompt, sides
    first = sides[names[0]]
    shared = [
        n for n in lengths[names[0]] if all(n in lengths[name] and sides[name][:n] == first[:n] for name in names)
    ]
    if not shared or any(sides[name][0]["role"] == "assistant" for name in names):
        raise UserError(
            f"{' and '.join(names)} with turns before the reply that are not for certain those of the prompt: give the "
            "reply alone, or the same whole conversation in each of them"
        )
    head = first[: shared[-1]]
    sides = {name: side[shared[-1] :] if name in names else side for name, side in sides.items()}
    is_missing = prompt[0]["role"] == "system" and head[0]["role"] != "system"
    return ([prompt[0], *head] if is_missing else head), sides


def _heads(prompt: list[dict], side: list[dict]) -> list[int]:
    """Return the lengths of the beginnings of ``side`` that end with ``prompt``, before an assistant's turn."""
    asked, systems = _bare(prompt), []
    if asked and asked[0][0] == "system":
        systems, asked = asked[:1], asked[1:]
    lengths = []
    for n in range(1, len(side)):
        head = _bare(side[:n])
        if systems and head[0][0] == "system":
            if head[:1] != systems:
                continue
            head = head[1:]
        if side[n]["role"] == "assistant" and asked and head[-len(asked) :] == asked:
            lengths.append(n)
    return lengths


def _bare(messages: list[dict]) -> list[tuple]:
    """Return what tells messages apart, blanks around their contents left out."""
    bare = []
    for message in messages:
        content = message.get("content") or ""
        content = content.strip() if isinstance(content, str) else content
        bare.append((message["role"], content, message.get("tool_calls") or []))
    return bare


def _check_replies(prompt: list[dict], sides: dict[str, list[dict]]) -> None:
    if not prompt:
        raise UserError("there is no prompt before the reply: at least one message is needed")
    for name, reply in sides.items():
        check_messages([*prompt, *reply])
        if not reply or reply[-1]["role"] != "assistant":
            raise UserError(f"{name} must end with an assistant turn")
        if not (reply[-1].get("content") or "").strip() and not reply[-1].get("tool_calls"):
            raise UserError(f"{name} is an empty answer: there is nothing to compare")
    if sides.get("chosen") == sides.get("rejected", ()):
        raise UserError("chosen and rejected are equal: neither is to be preferred")
