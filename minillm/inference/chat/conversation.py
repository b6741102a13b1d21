"""The conversation of a chat: questions and answers, the part of them that a prompt holds, and their file.

A file has one conversation per line, ``{"messages": [...]}``, as training reads them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data import read_records
from minillm.data.schema import parse_record
from minillm.errors import UserError
from minillm.files import atomic_file
from minillm.inference.thinking import NO_THOUGHTS, without_thinking


@dataclass(kw_only=True)
class Exchange:
    """A question and all that followed until the next one: the answer, or tool calls, their results and the answer."""

    messages: list[dict]
    is_whole: bool = True
    """False: Ctrl-C or the limit of tokens ended the answer."""


@dataclass(kw_only=True)
class Conversation:
    """What was said, with the thoughts of the answers."""

    system: str = ""
    tools: list[dict] | None = None
    """Functions that the model may call, in OpenAI's form."""
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def messages(self) -> list[dict]:
        """Return all messages, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *(message for exchange in self.exchanges for message in exchange.messages)]

    @property
    def n_cut(self) -> int:
        """Return the number of answers that are not whole."""
        return sum(not exchange.is_whole for exchange in self.exchanges)


def split_exchanges(messages: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """Return the system message at the beginning, if there is one, and the others in groups that begin with a user."""
    n_system = int(bool(messages) and messages[0]["role"] == "system")
    groups: list[list[dict]] = []
    for message in messages[n_system:]:
        if message["role"] == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return messages[:n_system], groups


def without_old_thoughts(messages: list[dict]) -> list[dict]:
    """Return messages for a prompt: earlier answers keep the form, but lose their thoughts; the last exchange is whole.

    Earlier answers in the prompts of DeepSeek-R1 (2025) and its successors also have no thoughts.
    """
    last_question = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    return [*map(_without_thoughts, messages[:last_question]), *messages[last_question:]]


def _without_thoughts(message: dict) -> dict:
    if message["role"] != "assistant" or not message.get("content"):
        return message
    message = message | {"content": without_thinking(message["content"])}
    if message.pop("reasoning_content", None):
        message["content"] = f"{NO_THOUGHTS}\n{message['content']}"
    return message


# ---- files -------------------------------------------------------------------------------------------------------


def save_conversation(conversation: Conversation, path: Path, *, earlier_line: bytes = b"") -> bytes:
    """Add a conversation to a ``.jsonl`` file as its last line, and return the line.

    Args:
        earlier_line: the line of an earlier call: if it is the last one of the file, the new one replaces it.

    Raises:
        UserError: there is nothing to save, the name does not end in ``.jsonl``, or the file cannot be written.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path}: a chat is saved as .jsonl, one conversation per line, as training reads it")
    if not conversation.exchanges:
        raise UserError("there is no answer yet: nothing to save")
    record = {"messages": conversation.messages} | ({"tools": conversation.tools} if conversation.tools else {})
    parse_record(record, 1)  # what is saved must be a record for training
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    try:
        path = path.resolve()  # through a link
        earlier = path.read_bytes() if path.exists() else b""
        if earlier_line and earlier.endswith(earlier_line):
            earlier = earlier.removesuffix(earlier_line)
        elif earlier and not earlier.endswith(b"\n"):
            earlier += b"\n"
        with atomic_file(path) as temporary:
            temporary.write_bytes(earlier + line)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name a file in a folder that exists") from None
    return line


def load_conversation(path: Path, *, line: int | None = None) -> tuple[Conversation, str]:
    """Return a conversation of a file, and its last question if that has no answer, else "".

    Args:
        path: a file of conversations in any form that training reads.
        line: which one: its line, or its number in a JSON array, from 1; None: the last.

    Raises:
        UserError: the file cannot be read, has no such line, or what stands there is not a conversation.
    """
    record, problem = None, f"{path} has no line {line}"

    def note_problem(number: int, reason: str, raw: str) -> None:
        nonlocal record, problem
        if line in (None, number):
            record, problem = None, f"{path}, line {number}: {reason}"

    for usable_record in read_records(path, on_reject=note_problem):
        if line in (None, usable_record.line):
            record = usable_record
    if record is None:
        raise UserError(problem)
    if record.kind != "chat":
        raise UserError(f"{path}, line {record.line} is a {record.kind} record, not a conversation")
    system, groups = split_exchanges(record.messages)
    unanswered = groups.pop()[0]["content"] if groups and groups[-1][-1]["role"] == "user" else ""
    exchanges = [Exchange(messages=group) for group in groups]
    system_text = system[0]["content"] if system else ""
    return Conversation(system=system_text, tools=record.tools, exchanges=exchanges), unanswered
