"""``Answer``: the answer to a chat, which a thread of its own receives.

Streamlit runs a page's program from the top whenever something is clicked, and breaks off the run before. So the page
must not hold the stream: a thread does, and the page looks at what came so far as often as it is drawn.
"""

import threading
import time

from minillm.serving.tools import Toolbox, tool_loop
from minillm.web.client import Client, ServerError, Stream

MAX_ROUNDS = 5  # of tools in one answer
MAX_CALLS = 32  # of tools in one round
PATIENCE_S = 30.0  # without anybody who looks: the tab was closed, or takes long to be reloaded


class Answer:
    """Asks the server, and again with the results of the tools that the model calls, until the model has answered.

    Args:
        request: of the chat completion; its ``messages`` end with the question.
        toolbox: what the model may call; its tools are run here.

    Attributes:
        question: the text of that question. error: what went wrong; empty if nothing did.
    """

    def __init__(self, client: Client, request: dict, *, toolbox: Toolbox, patience_s: float = PATIENCE_S):
        self.question, self.error = request["messages"][-1]["content"], ""
        self._client, self._request, self._toolbox, self._patience_s = client, request, toolbox, patience_s
        self._messages: list[dict] = []
        self._stream: Stream | None = None
        self._is_stopped = False
        self._seen = time.monotonic()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="answer")
        self._thread.start()
        threading.Thread(target=self._watch, daemon=True, name="watch").start()

    @property
    def is_running(self) -> bool:
        """Whether more may come."""
        return self._thread.is_alive()

    def look(self) -> list[dict]:
        """Return the messages so far: assistant, and with tools tool, assistant, ...; the last one may still grow."""
        self._seen = time.monotonic()
        with self._lock:
            return [
                message | {"info": dict(message["info"])} if "info" in message else message
                for message in self._messages
            ]

    def stop(self) -> None:
        """End the answer with what came so far; the server is told by a closed connection."""
        self._is_stopped = True
        if self._stream is not None:
            self._stream.close()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when nothing more comes, or after ``timeout_s``."""
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        """Stop the answer when nobody looks any more. A complete one is held that long for a tab that is reloaded."""
        while time.monotonic() < self._seen + self._patience_s:
            time.sleep(min(0.5, self._patience_s / 4))
        self.stop()

    def _run(self) -> None:
        messages = self._request["messages"]
        try:
            for message in tool_loop(self._receive, messages, self._toolbox, max_rounds=MAX_ROUNDS):
                if message["role"] == "tool":  # the others are there already
                    self._add(message)
            if self._messages[-1]["role"] == "tool":
                self.error = f"the model called tools {MAX_ROUNDS + 1} times without an answer"
        except _Stopped:
            return
        except ServerError as error:
            self.error = str(error)
        if self.error:
            last = next(message for message in reversed(self._messages) if message["role"] == "assistant")
            last["info"]["error"] = self.error

    def _add(self, message: dict) -> None:
        with self._lock:
            self._messages.append(message)

    def _receive(self, messages: list[dict], tools: list[dict]) -> dict:
        """Ask the server once and return its whole message; meanwhile it grows in ``self._messages``."""
        start, n_pieces, info = time.monotonic(), 0, {"model": self._request["model"]}
        message = {"role": "assistant", "content": "", "info": info}
        self._add(message)
        request = self._request | {"messages": messages} | ({"tools": tools} if tools else {})
        self._stream = self._client.stream_chat(request)
        try:
            for chunk in [] if self._is_stopped else self._stream:  # stopped before there was a stream to close
                with self._lock:
                    try:
                        n_pieces += add_chunk(message, chunk)
                    except (TypeError, KeyError, AttributeError, IndexError):
                        raise ServerError(f"the server sent a chunk of an unknown form: {str(chunk)[:80]}") from None
                    if n_pieces:
                        info.setdefault("first_s", time.monotonic() - start)
                    info["seconds"] = time.monotonic() - start
                    info["n_tokens"] = (chunk.get("usage") or {}).get("completion_tokens") or n_pieces
        finally:
            self._stream.close()
        if self._is_stopped:
            info["finish_reason"] = "stopped"
            raise _Stopped
        return {key: value for key, value in message.items() if key != "info"}


class _Stopped(Exception):
    """Ends the loop of an answer that nobody wants any more."""


def add_chunk(message: dict, chunk: dict) -> int:
    """Add a chunk of a streamed answer to ``message``; return 1 if it held text, else 0.

    Calls of tools come in parts: the first part of each has its id and name, all have a piece of the arguments.
    """
    if not chunk.get("choices"):
        return 0  # such as the last chunk, which has the usage
    choice, info = chunk["choices"][0], message.setdefault("info", {})
    delta = choice.get("delta") or {}
    for name in ("content", "reasoning_content"):
        if delta.get(name):
            message[name] = (message.get(name) or "") + delta[name]
    for part in delta.get("tool_calls") or []:
        calls, index = message.setdefault("tool_calls", []), part.get("index", 0)
        if not 0 <= index < MAX_CALLS:
            raise IndexError(index)
        while len(calls) <= index:
            calls.append({"id": f"call_{len(calls)}", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[index], part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""
    if tokens := (choice.get("logprobs") or {}).get("content"):
        info.setdefault("tokens", []).extend(tokens)
    if choice.get("finish_reason"):
        info["finish_reason"] = choice["finish_reason"]
    return int(bool(delta.get("content") or delta.get("reasoning_content")))
