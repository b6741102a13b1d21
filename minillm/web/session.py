"""``Session``: what one browser tab has on the chat page, apart from the settings of its widgets.

Nothing here is shared between tabs, and nothing here draws. After a click Streamlit draws the page in a new thread,
while the old one goes on until it draws the next thing: for a moment both are at work here.
"""

import contextlib
import json
import threading
from dataclasses import dataclass, field

from minillm.errors import UserError
from minillm.web import chats
from minillm.web.answer import Answer
from minillm.web.chats import Chat

STOP_S = 5.0  # until an answer that was stopped has ended; then it is taken as it is


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
    _has_question: bool = False
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
            self.chat.ask(question, turn=turn)
            self._has_question, self.editing = True, None

    def ask_again(self) -> None:
        """Have the last question answered again."""
        self.stop()
        self.chat.drop_answer()
        self._has_question, self.editing = True, None

    def take_question(self) -> bool:
        """Return whether the chat that is shown has a question to be sent; True once per question."""
        with self._lock:
            has_question, self._has_question = self._has_question, False
        return has_question

    def receive(self, answer: Answer) -> None:
        """Let ``answer`` be that of the chat that is shown."""
        self.answers[self.chat.id] = answer

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
        """Return what the tab keeps: the chats that are not empty, and which of them is shown."""
        full = [chat for chat in self.chats if chat.messages]
        shown = full.index(self.chat) if self.chat in full else None
        return json.dumps({"shown": shown, "file": chats.to_json(full)}) if full else ""

    def restore(self, text: str) -> None:
        """Take over what ``dump`` returned before the tab was reloaded; a text that is something else is ignored."""
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a UserError is a ValueError
            content = json.loads(text)
            restored = chats.from_json(content["file"])
            self.chats = restored + [chat for chat in self.chats if chat.messages]
            if content["shown"] is not None:
                self.show(restored[content["shown"]])
            else:
                self.new_chat()
