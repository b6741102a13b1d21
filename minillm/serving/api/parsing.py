"""From the text of an answer to the fields of a message: ``reasoning_content``, ``content``, ``tool_calls``.

A streamed answer and a whole one go through the same parser, so the joined pieces of one are the other.
"""

from minillm.inference.thinking import Part, ThinkingSplitter
from minillm.serving.tools.parse import ToolCallParser


class AnswerParser:
    """Turns the text of one answer, in pieces of any size, into deltas of OpenAI's message.

    Args:
        opened: beginning of the answer that the prompt already contains (see ``ThinkingSplitter``); None: the text is
            not searched for thinking.
        tools: the declared functions; None: the text is not searched for calls.
    """

    def __init__(self, *, opened: str | None, tools: list[dict] | None):
        self._thinking = None if opened is None else ThinkingSplitter(opened=opened)
        self._tools = None if tools is None else ToolCallParser(tools=tools)
        self._has_text = {True: False, False: False}  # thinking, content
        self.n_calls = 0

    def push(self, piece: str) -> list[dict]:
        """Return the deltas that are certain now."""
        if self._thinking is None:
            return self._content(piece)
        return self._deltas(self._thinking.push(piece))

    def finish(self) -> list[dict]:
        """Return what was held back; call it when no more text follows."""
        deltas = self._deltas(self._thinking.finish()) if self._thinking is not None else []
        if self._tools is not None:
            deltas += self._tool_deltas(*self._tools.finish())
        return deltas

    def _deltas(self, parts: list[Part]) -> list[dict]:
        deltas = []
        for part in parts:
            has_text = self._has_text[part.is_thinking]
            text = "\n" + part.text if part.is_new and has_text else part.text
            self._has_text[part.is_thinking] = True
            deltas += [{"reasoning_content": text}] if part.is_thinking else self._content(text)
        return deltas

    def _content(self, text: str) -> list[dict]:
        if self._tools is not None:
            return self._tool_deltas(*self._tools.push(text))
        return [{"content": text}] if text else []

    def _tool_deltas(self, content: str, calls: list[dict]) -> list[dict]:
        """Return the deltas of a text and of whole calls; the arguments of a call are not cut into pieces."""
        deltas: list[dict] = [{"content": content}] if content else []
        for call in calls:
            deltas.append({"tool_calls": [{"index": self.n_calls} | call]})
            self.n_calls += 1
        return deltas


def join_deltas(deltas: list[dict]) -> dict:
    """Return the message that deltas add up to."""
    message: dict = {"role": "assistant", "content": None}
    for delta in deltas:
        for name, value in delta.items():
            if name == "tool_calls":
                calls = [{key: part for key, part in call.items() if key != "index"} for call in value]
                message.setdefault(name, []).extend(calls)
            else:
                message[name] = (message.get(name) or "") + value
    if message["content"] is None and "tool_calls" not in message:
        message["content"] = ""
    return message
