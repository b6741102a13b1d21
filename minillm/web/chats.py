"""``Chat``: a conversation with its settings, and how chats are exported and imported.

Messages are OpenAI's (``role``, ``content``, ``tool_calls``, ...). Each answer has one key more, ``info``: the model,
how fast it answered, why it ended, what went wrong. It is kept here and never sent.
"""

import json
import secrets
from dataclasses import dataclass, field

from minillm.errors import UserError

FORMAT = "minillm chats 1"
MAX_TITLE = 40  # characters
ROLES = ("user", "assistant", "tool")
SENT = ("role", "content", "tool_calls", "tool_call_id")  # the thoughts of earlier answers are not
INFO = {"model": str, "finish_reason": str, "n_tokens": int, "seconds": float, "first_s": float, "error": str}


@dataclass
class Chat:
    """A conversation.

    Attributes:
        messages: alternating turns: a question (``user``), then its answer: ``assistant``, and where tools were called
            ``tool`` and ``assistant`` again. A question without an answer may be the last one.
        system: the system message; empty: none.
    """

    messages: list[dict] = field(default_factory=list)
    system: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def title(self) -> str:
        """The beginning of the first question; empty in a new chat."""
        text = " ".join(self.messages[0]["content"].split()) if self.messages else ""
        return text if len(text) <= MAX_TITLE else text[: MAX_TITLE - 1] + "…"

    def turns(self) -> list[list[dict]]:
        """Return the messages by turn: each a question and the messages of its answer."""
        turns: list[list[dict]] = []
        for message in self.messages:
            if message["role"] == "user":
                turns.append([])
            turns[-1].append(message)
        return turns

    def ask(self, question: str, *, turn: int | None = None) -> None:
        """Put a question at the end; or in the place of turn number ``turn``, whose answer and all later turns go."""
        kept = self.turns()[:turn] if turn is not None else self.turns()
        self.messages = [message for each in kept for message in each] + [{"role": "user", "content": question}]

    def drop_answer(self) -> None:
        """Remove the answer to the last question."""
        while self.messages and self.messages[-1]["role"] != "user":
            self.messages.pop()

    def prompt(self, *, n_earlier: int) -> list[dict]:
        """Return what is sent to be answered: the system message, ``n_earlier`` earlier turns, the last question.

        Earlier turns without an answer (stopped, failed) are left out: chat templates want them to alternate.
        """
        *earlier, last = self.turns()
        answered = [turn for turn in earlier if turn[-1]["role"] == "assistant" and turn[-1].get("content")]
        kept = [*answered[max(0, len(answered) - n_earlier) :], last[:1]]
        messages = [{key: message[key] for key in SENT if key in message} for turn in kept for message in turn]
        return [{"role": "system", "content": self.system}, *messages] if self.system.strip() else messages


def to_json(chats: list[Chat]) -> str:
    """Return chats as a text that ``from_json`` reads. The probabilities of tokens are left out: they are long."""
    content = {"format": FORMAT, "chats": [_plain(chat) for chat in chats if chat.messages]}
    return json.dumps(content, ensure_ascii=False, indent=1)


def _plain(chat: Chat) -> dict:
    messages = []
    for message in chat.messages:
        info = {key: value for key, value in message.get("info", {}).items() if key != "tokens"}
        messages.append(
            {key: value for key, value in message.items() if key != "info"} | ({"info": info} if info else {})
        )
    return ({"system": chat.system} if chat.system else {}) | {"messages": messages}


def from_json(text: str | bytes) -> list[Chat]:
    """Return the chats of an exported file, or of one conversation ``{"messages": [...]}`` in OpenAI's form.

    Raises:
        UserError: it is something else; the message says where.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not a file of chats: not JSON ({error})") from None
    if isinstance(content, dict) and "messages" in content:
        content = {"chats": [content]}
    if not isinstance(content, dict) or not isinstance(content.get("chats"), list):
        raise UserError('not a file of chats: it must hold {"chats": [...]} or {"messages": [...]}')
    if content.get("format", FORMAT) != FORMAT:
        raise UserError(f"not a file of chats: its format is {content['format']!r}, this page reads {FORMAT!r}")
    return [_read_chat(number, chat) for number, chat in enumerate(content["chats"], start=1)]


def _read_chat(number: int, content) -> Chat:
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        raise UserError(f"chat {number}: has no list of messages")
    system, messages = content.get("system", ""), list(content["messages"])
    for position, message in enumerate(messages, start=1):
        problem = _problem_of(message)
        if problem:
            raise UserError(f"chat {number}, message {position}: {problem}")
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    if not isinstance(system, str):
        raise UserError(f"chat {number}: its system message is no text")
    if any(message["role"] == "system" for message in messages):
        raise UserError(f"chat {number}: a system message stands behind its beginning")
    if messages and messages[0]["role"] != "user":
        raise UserError(f"chat {number}: must begin with a question (role user), not {messages[0]['role']}")
    return Chat([_read_message(message) for message in messages], system)


def _read_message(message: dict) -> dict:
    """Return a message with those parts of its info that this page knows."""
    info = {key: value for key, value in message.get("info", {}).items() if isinstance(value, INFO.get(key, ()))}
    return {key: value for key, value in message.items() if key != "info"} | ({"info": info} if info else {})


def _problem_of(message) -> str:
    """Return what is wrong with a message of a file, or nothing."""
    if not isinstance(message, dict) or message.get("role") not in (*ROLES, "system"):
        return f"must have a role ({', '.join(ROLES)} or system)"
    for name in ("content", "reasoning_content"):
        if not isinstance(message.get(name) or "", str):
            return f"its {name} is no text"
    if message["role"] == "user" and not message.get("content"):
        return "is an empty question"
    if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
        return "has no tool_call_id"
    if not isinstance(message.get("info", {}), dict):
        return "its info is no object"
    calls = message.get("tool_calls") or []
    is_call = isinstance(calls, list) and all(_is_call(call) for call in calls)
    return "" if is_call else "its tool_calls are not OpenAI's"


def _is_call(call) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and all(isinstance(function.get(key), str) for key in ("name", "arguments"))
