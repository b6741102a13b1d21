"""``Answer``: the answer to a chat, which a thread of its own receives.

Streamlit runs a page's program from the top whenever something is clicked, and breaks off the run before. So the page
must not hold the stream: a thread does, and the page looks at what came so far as often as it is drawn.
"""

import threading
import time
from collections.abc import Callable

from minillm.web.client import Client, ServerError, Stream

MAX_ROUNDS = 6  # of tools in one answer
MAX_CALLS = 32  # of tools in one round
PATIENCE_S = 15.0  # without anybody who looks: the tab was closed


class Answer:
    """Asks the server, and again with the results of the tools that the model calls, until the model has answered.

    Args:
        request: of the chat completion; its ``messages`` end with the question.
        call_tool: from the name of a tool and its arguments (JSON) to its result or what is wrong with the call.

    Attributes:
        error: what went wrong; empty if nothing did.
    """

    def __init__(
        self,
        client: Client,
        request: dict,
        *,
        call_tool: Callable[[str, str], str] | None = None,
        patience_s: float = PATIENCE_S,
    ):
        self.error = ""
        self._client, self._request, self._call_tool, self._patience_s = client, request, call_tool, patience_s
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
        """Return when nothing more comes."""
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        while self.is_running:
            if time.monotonic() > self._seen + self._patience_s:
                self.stop()
            self._thread.join(min(0.5, self._patience_s / 4))

    def _run(self) -> None:
        for _ in range(MAX_ROUNDS):
            message = {"role": "assistant", "content": "", "info": {"model": self._request["model"]}}
            with self._lock:
                self._messages.append(message)
            try:
                self._receive(message)
            except ServerError as error:
                self.error = message["info"]["error"] = str(error)
                return
            calls = message.get("tool_calls")
            if not calls or self._is_stopped or self._call_tool is None:
                return
            for call in calls:
                function = call["function"]
                result = self._call_tool(function["name"], function["arguments"])
                with self._lock:
                    self._messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        self.error = message["info"]["error"] = f"the model called tools {MAX_ROUNDS} times without an answer"

    def _receive(self, message: dict) -> None:
        start, info, n_pieces = time.monotonic(), message["info"], 0
        sent = [{key: value for key, value in each.items() if key != "info"} for each in self._messages[:-1]]
        self._stream = self._client.stream_chat(self._request | {"messages": self._request["messages"] + sent})
        try:
            if self._is_stopped:  # before there was a stream to close
                return
            for chunk in self._stream:
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
            if self._is_stopped:
                info["finish_reason"] = "stopped"
            self._stream.close()


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
