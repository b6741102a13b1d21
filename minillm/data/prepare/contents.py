"""The texts of a record, of any kind: read them, change them, and write the record as one line of our own layout.

    text        {"text"}
    chat        {"conversations": messages}
    preference  {"chosen": messages, "rejected": messages}, each the whole conversation
    judged      {"messages": messages, "label"}

All but texts may also have "tools". Other keys of a record are kept, except those that repeat the conversation in
another layout.
"""

from collections.abc import Callable
from dataclasses import replace

from minillm.data.schema import Record
from minillm.data.sources.columns import CONVERSATIONS, QUESTIONS

_REPEATED = ("text", *CONVERSATIONS, *QUESTIONS[:-1])  # ``parse_record`` takes them only if they repeat the messages


def texts_of(record: Record) -> list[str]:
    """Return the texts of a record: its text, or what each turn says, with its thinking first."""
    if record.kind == "text":
        return [record.text]
    turns = [*record.messages, *(record.chosen or []), *(record.rejected or [])]
    return [turn[key] for turn in turns for key in ("reasoning_content", "content") if turn.get(key)]


def questions_of(record: Record) -> list[str]:
    """Return what is asked: the text, or the turns of the user."""
    if record.kind == "text":
        return [record.text]
    return [turn["content"] for turn in record.messages if turn["role"] == "user" and turn.get("content")]


def change_texts(record: Record, change: Callable[[str], str]) -> Record:
    """Return the record with ``change`` applied to each of its texts; the record itself if nothing changes.

    A changed record has no ``log_prob``, because that was the probability of another text.
    """
    texts = texts_of(record)
    if all(change(text) == text for text in texts):
        return record
    if record.kind == "text":
        return replace(record, text=change(record.text), log_prob=None)

    def changed(turns: list[dict] | None) -> list[dict] | None:
        keys = ("reasoning_content", "content")
        return turns and [turn | {key: change(turn[key]) for key in keys if turn.get(key)} for turn in turns]

    parts = {name: changed(getattr(record, name)) for name in ("messages", "chosen", "rejected")}
    return replace(record, **parts, log_prob=None)


def to_json(record: Record) -> dict:
    """Return the record in the layout of the module's docstring; ``parse_record`` gives the same record back."""
    log_prob = {} if record.log_prob is None else {"log_prob": record.log_prob}
    if record.kind == "text":
        return {"text": record.text, **log_prob, **record.extra}
    extra = {key: item for key, item in record.extra.items() if key not in _REPEATED}
    if record.kind == "chat":
        value = {"conversations": record.messages}
    elif record.kind == "preference":
        value = {name: [*record.messages, *getattr(record, name)] for name in ("chosen", "rejected")}
    else:
        value = {"messages": [*record.messages, *record.chosen], "label": record.label}
    tools = {} if record.tools is None else {"tools": record.tools}
    return value | tools | log_prob | extra
