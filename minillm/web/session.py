"""``Session``: what one browser tab has on the chat page, apart from the settings of its widgets.

Nothing here is shared between tabs, and nothing here draws. After a click Streamlit draws the page in a new thread,
while the old one goes on until it draws the next thing: for a moment both are at work here. A tab that is reloaded gets
a new session, which takes over the chats that the tab has kept and the answers that were on their way.
"""

import contextlib
import json
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from minillm.errors import UserError
from minillm.web import chats
from minillm.web.answer import Answer
from minillm.web.chats import Chat

STOP_S = 5.0  # until an answer that was stopped has ended; then it is taken as it is
# The last answer to each chat, of all tabs, until nobody has looked for a while. Only its own tab knows a chat's id.
_RECENT: weakref.WeakValueDictionary[str, Answer] = weakref.WeakValueDictionary()


class Shown(NamedTuple):
    """What there is of a chat at one moment: its turns, the answer that the last one waits for, ``n_complete``."""

    turns: list[list[dict]]
    answer: Answer | None
    n_complete: int


@dataclass
class Session:
    """The chats of a tab, newest first, and the answers that are being received.

    Attributes:
        answers: by the id of their chat. n_complete: answers that were put into their chats so far.
        editing: number of the turn that is being edited, in that chat. problem: with the file that was imported.
        stored: the text that the tab keeps, as ``dump`` made it; None until the tab has told it.
    """

    chats: list[Chat] = field(default_factory=lambda: [Chat()])
    current_id: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    n_complete: int = 0
    editing: int | None = None
    problem: str = ""
    stored: str | None = None
    _asked: set[str] = field(default_factory=set)  # chats whose question is still to be sent
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def chat(self) -> Chat:
        """The chat that is shown."""
        return next((chat for chat in self.chats if chat.id == self.current_id), self.chats[0])

    @property
    def answer(self) -> Answer | None:
        """The answer that the chat that is shown waits for."""
        return self.answers.get(self.chat.id)

    def show(self, chat: Chat) -> None:
        """Make ``chat`` the one that is shown."""
        self.current_id, self.editing = chat.id, None

    def new_chat(self) -> None:
        """Show an empty chat; the first one that there is, or a new one."""
        empty = next((chat for chat in self.chats if not chat.messages), None)
        if empty is None:
            empty = Chat()
            self.chats.insert(0, empty)
        self.show(empty)

    def delete_chat(self) -> None:
        """Remove the chat that is shown, and stop its answer."""
        chat = self.chat
        if answer := self.answers.pop(chat.id, None):
            answer.stop()
        self.chats.remove(chat)
        self.chats = self.chats or [Chat()]
        self.show(self.chats[0])

    def ask(self, question: str, *, turn: int | None = None) -> None:
        """Ask in the chat that is shown; ``turn``: in the place of that turn. An answer that still runs is stopped."""
        if question.strip():
            self.stop()
            with self._lock:
                self.chat.ask(question, turn=turn)
                self._asked.add(self.chat.id)
            self.editing = None

    def ask_again(self) -> None:
        """Have the last question answered again."""
        self.stop()
        with self._lock:
            self.chat.drop_answer()
            self._asked.add(self.chat.id)
        self.editing = None

    def send(self, start: Callable[[Chat], Answer]) -> None:
        """Have ``start`` send each new question, once; a second thread waits here and finds the answer."""
        with self._lock:
            for chat in self.chats:
                if chat.id in self._asked:
                    self._asked.remove(chat.id)
                    self.answers[chat.id] = _RECENT[chat.id] = start(chat)

    def shown(self) -> Shown:
        """Return what is to be drawn of the chat that is shown."""
        with self._lock:
            return Shown(self.chat.turns(), self.answer, self.n_complete)

    def stop(self) -> None:
        """Stop the answer of the chat that is shown; what came of it stays."""
        if answer := self.answer:
            answer.stop()
            answer.wait(STOP_S)
            self._put(answer, self.chat)

    def look(self) -> None:
        """Tell the answers that somebody still waits for them."""
        for answer in list(self.answers.values()):
            answer.look()

    def collect(self) -> None:
        """Put the answers that are complete into their chats."""
        for chat in list(self.chats):
            answer = self.answers.get(chat.id)
            if answer and not answer.is_running:
                self._put(answer, chat)

    def _put(self, answer: Answer, chat: Chat) -> None:
        with self._lock:
            if self.answers.get(chat.id) is answer:  # otherwise another thread was faster
                del self.answers[chat.id]
                chat.messages += answer.look()
                self.n_complete += 1

    def add(self, text: str | bytes) -> int:
        """Add the chats of an exported file before the others, show the first, and return how many there were.

        Raises:
            UserError: the file holds no chats, or is none.
        """
        added = chats.from_json(text)
        if not added:
            raise UserError("the file holds no chats")
        self.chats = added + self.chats
        self.show(added[0])
        return len(added)

    def dump(self) -> str:
        """Return what the tab keeps: the chats that are not empty, their ids, and which of them is shown."""
        full = [chat for chat in self.chats if chat.messages]
        shown = full.index(self.chat) if self.chat in full else None
        ids = [chat.id for chat in full]
        return json.dumps({"shown": shown, "ids": ids, "file": chats.to_json(full)}) if full else ""

    def restore(self, text: str) -> None:
        """Take over what ``dump`` returned before the tab was reloaded; a text that is something else is ignored.

        An answer that was not complete then, or that the tab had no time to keep, goes on here.
        """
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a UserError is a ValueError
            content = json.loads(text)
            restored = chats.from_json(content["file"])
            for chat, chat_id in zip(restored, content["ids"], strict=True):
                chat.id, last, answer = chat_id, chat.messages[-1], _RECENT.get(chat_id)
                if answer and last["role"] == "user" and last["content"] == answer.question:
                    self.answers[chat.id] = answer
            self.chats = restored + [chat for chat in self.chats if chat.messages]
            if content["shown"] is not None:
                self.show(restored[content["shown"]])
            else:
                self.new_chat()
