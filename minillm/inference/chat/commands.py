"""The commands of a chat, such as ``/system TEXT``. Each returns what to print, and leaves printing to the caller."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import UserError
from minillm.inference.chat.conversation import Conversation, load_conversation, save_conversation
from minillm.inference.chat.session import ChatSession

OFF = "off"
ENDS = ("exit", "quit")  # words that end a chat like /quit
_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)  # not "/etc/hosts", nor "/ means what?"
NOTES = """\
A line that ends with \\ goes on in the next one; so does a text between triple quotes (\"\"\").
Ctrl-C stops an answer and keeps what was said. Ctrl-D ends the chat."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command, with what ``/help`` says about it."""

    arguments: str
    help: str
    run: Callable[[ChatSession, str], str]
    for_text: bool = True
    """It also makes sense with a model that only completes text."""


def run_command(session: ChatSession, line: str) -> str | None:
    """Run the command in ``line`` and return what to print; None if the line is not a command.

    Raises:
        UserError: an unknown command or a value that it does not take; the chat stays as it was.
    """
    if line.strip().lower() in ENDS:
        line = "/quit"
    match = _COMMAND.fullmatch(line.strip())
    if match is None:
        return None
    name, argument = match[1].lower(), (match[2] or "").strip()
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {similar[0]}? " if similar else ""
        raise UserError(f'unknown command {name}: {advice}/help lists all; put a question that begins so in """')
    command = COMMANDS[name]
    if session.chat_model.completes_text and not command.for_text:
        raise UserError(f"{name}: texts have no conversation; start a chat with --model_mode 1, 2 or 3")
    if argument and not command.arguments:
        raise UserError(f"{name} takes nothing after it, not {argument[:40]!r}")
    return command.run(session, argument)


def _help(session: ChatSession, argument: str) -> str:
    rows = [(f"{name} {command.arguments}".rstrip(), command.help) for name, command in COMMANDS.items()]
    width = max(len(usage) for usage, _ in rows) + 2
    return "\n".join([*(f"{usage:<{width}}{text}" for usage, text in rows), NOTES])


def _reset(session: ChatSession, argument: str) -> str:
    session.conversation = Conversation(system=session.conversation.system, tools=session.tools)
    session.unanswered, session.saved_line = "", b""
    return "the conversation is forgotten" + ("; the system message stays" if session.conversation.system else "")


def _system(session: ChatSession, argument: str) -> str:
    if argument:
        session.conversation.system = "" if argument.lower() == OFF else argument
    return f"system message: {session.conversation.system or 'none'}"


def _think(session: ChatSession, argument: str) -> str:
    mode = argument.lower()
    if mode not in ("", "on", OFF, "dim", "plain", "hide"):
        raise UserError(f"/think {argument}: allowed are on, off, dim, plain, hide")
    if mode == OFF and not session.chat_model.direct_start:
        raise UserError("/think off: this model's tokenizer has no <think>, so it cannot be told not to think")
    if mode:
        session.thinks = mode != OFF
    if mode in ("dim", "plain", "hide"):
        session.thinking = mode
    elif mode == "on" and session.thinking == "hide":
        session.thinking = "dim"
    if not session.thinks:
        return "thinking: off, answers begin with an empty think block"
    shown = {"dim": "shown dimmed", "plain": "shown like the answer", "hide": "not shown"}[session.thinking]
    return f"thinking: {shown}"


def _model(session: ChatSession, argument: str) -> str:
    return _switch(session, argument, "") if argument else _describe(session)


def _lora(session: ChatSession, argument: str) -> str:
    if not argument:
        return _describe(session)
    return _switch(session, session.chat_model.name, "" if argument.lower() == OFF else argument)


def _switch(session: ChatSession, name: str, lora_name: str) -> str:
    """Load another model, which says what it is, and use it from now on; after an error the old one stays."""
    try:
        session.chat_model = session.load(name, lora_name)
    except UserError as error:
        message = str(error).replace("--from_weight", "/model").replace("--lora_name", "/lora")
        raise UserError(f"{message}; still {_describe(session)}") from None
    return "the conversation goes on; /reset forgets it" if session.conversation.exchanges else ""


def _describe(session: ChatSession) -> str:
    adapters = session.chat_model.lora_name
    return f"model: {session.chat_model.name}, " + (f"adapter: {adapters}" if adapters else "no adapter")


def _save(session: ChatSession, argument: str) -> str:
    if not argument:
        raise UserError("/save needs a file, such as chat.jsonl")
    path = Path(argument).expanduser()
    path = path if path.suffix else path.with_suffix(".jsonl")
    session.saved_line = save_conversation(session.conversation, path, earlier_line=session.saved_line)
    message = f"saved {_count(session)} as the last line of {path}"
    if n_cut := session.conversation.n_cut:
        message += f"; {n_cut} of the answers were cut: a model trained on this file learns to stop there"
    return message


def _load(session: ChatSession, argument: str) -> str:
    if not argument:
        raise UserError("/load needs a file, and may take the number of a line: chat.jsonl 3")
    file, _, number = argument.rpartition(" ")
    line = int(number) if file and number.isdecimal() and not Path(argument).expanduser().exists() else None
    path = Path(argument if line is None else file.strip()).expanduser()
    session.conversation, session.unanswered = load_conversation(path, line=line)
    session.conversation.tools = session.conversation.tools or session.tools
    session.saved_line = b""
    message = f"loaded {_count(session)} from {path}"
    return message + ("; the last question has no answer: /retry answers it" if session.unanswered else "")


def _count(session: ChatSession) -> str:
    n_answers = len(session.conversation.exchanges)
    return f"{n_answers} answer{'' if n_answers == 1 else 's'}"


def _retry(session: ChatSession, argument: str) -> str:
    session.retry()
    return ""


def _quit(session: ChatSession, argument: str) -> str:
    session.is_over = True
    return ""


COMMANDS = {
    "/help": Command(arguments="", help="show this", run=_help),
    "/reset": Command(arguments="", help="forget the conversation (also /clear)", run=_reset),
    "/retry": Command(arguments="", help="answer the last question again, with another sample", run=_retry),
    "/system": Command(arguments="[TEXT|off]", help="show or set the system message", run=_system, for_text=False),
    "/think": Command(
        arguments="[on|off|dim|plain|hide]",
        help="let the model think or not, and how its thinking is shown",
        run=_think,
        for_text=False,
    ),
    "/model": Command(arguments="[NAME]", help="show or change the model: a directory or a stage", run=_model),
    "/lora": Command(arguments="[NAME|off]", help="show or change the adapter", run=_lora),
    "/save": Command(
        arguments="FILE", help="add the conversation to a .jsonl file, as data for training", run=_save, for_text=False
    ),
    "/load": Command(
        arguments="FILE [LINE]", help="continue a conversation of a file (default: the last)", run=_load, for_text=False
    ),
    "/quit": Command(arguments="", help="end the chat (also /exit)", run=_quit),
}
ALIASES = {"/clear": "/reset", "/exit": "/quit"}
