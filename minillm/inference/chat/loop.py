"""The loop of a chat: read a line, answer it or run its command, until the user leaves."""

import sys

from minillm.errors import UserError
from minillm.inference.chat.commands import ALIASES, COMMANDS, run_command
from minillm.inference.chat.lines import LineReader
from minillm.inference.chat.session import ChatSession
from minillm.terminal import dim


def chat(session: ChatSession) -> None:
    """Read questions and commands, and stream answers, until ``/quit`` or the end of the input.

    Ctrl-C during an answer ends only this answer. At the prompt it drops the line; twice in a row it ends the chat.
    """
    reader = LineReader([*COMMANDS, *ALIASES])
    print(dim("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat."))
    was_interrupted = False
    while not session.is_over:
        try:
            text, may_be_command = reader.read()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if was_interrupted:
                return
            was_interrupted = True
            print(dim("Ctrl-C once more, or Ctrl-D, ends the chat."))
            continue
        except UnicodeDecodeError as error:
            print(f"error: the line is not UTF-8 text (byte {error.start})", file=sys.stderr)
            continue
        was_interrupted = False
        try:
            _answer(session, text, may_be_command)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # before or after the answer itself, or while a model was loaded
            print(dim("\n[stopped]"))


def _answer(session: ChatSession, text: str, may_be_command: bool) -> None:
    message = run_command(session, text) if may_be_command else None
    if message:
        print(message)
    elif message is None and text.strip():
        session.ask(text)
