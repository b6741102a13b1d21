"""``Client``: what the page asks an OpenAI server, over plain HTTP.

The answer to a chat is streamed as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html):
``data: {...}`` for each chunk, an empty line after each, ``data: [DONE]`` at the end. Closing the connection tells the
server that nobody waits any longer.
"""

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from minillm.errors import UserError

CONNECT_S = 10.0  # for a connection, and for the answers that come at once
SILENCE_S = 600.0  # between two chunks: a request may wait in the server's queue


class ServerError(UserError):
    """The server refused a request, broke off its answer, or is not there; ``status`` is None without an answer."""

    def __init__(self, message: str, *, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """Asks one server.

    Args:
        url: http://HOST:PORT, where the server's paths begin (``/v1/models``, ``/health``).
        api_key: sent with each request; empty: none.

    Raises:
        UserError: ``url`` is not such an address.
    """

    def __init__(self, url: str, *, api_key: str = ""):
        parts = urlsplit(url)
        try:
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port beyond 65535
            is_address = False
        if not is_address or parts.query or parts.fragment:
            raise UserError(f"{url!r} is not the address of a server; write it as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._is_secure, self._path = parts.scheme == "https", parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def is_up(self) -> bool:
        """Return whether something answers at the address, whatever it answers."""
        try:
            self._open("GET", "/health", timeout_s=CONNECT_S).close()
        except ServerError as error:
            return error.status is not None
        return True

    def models(self) -> list[dict]:
        """Return the models and adapters that the server has, as OpenAI describes them (``id``, perhaps ``parent``)."""
        with contextlib.closing(self._open("GET", "/v1/models", timeout_s=CONNECT_S)) as stream:
            content = stream.json()
        listed = content.get("data") if isinstance(content, dict) else None
        models = [model for model in listed or [] if isinstance(model, dict) and isinstance(model.get("id"), str)]
        if not models:
            raise ServerError(f"{self.url}/v1/models lists no model; is this an OpenAI server?")
        return models

    def stream_chat(self, request: dict) -> "Stream":
        """Send a chat completion; return its chunks as they come.

        Raises:
            ServerError: the server is not there or refuses the request; the message is the server's.
        """
        body = json.dumps(request | {"stream": True}).encode()
        return self._open("POST", "/v1/chat/completions", body, timeout_s=SILENCE_S)

    def _open(self, method: str, path: str, body: bytes | None = None, *, timeout_s: float) -> "Stream":
        connect = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = connect(self.host, self.port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request(method, self._path + path, body, self._headers)
            open_socket = connection.sock  # which the connection forgets if the server means to close it
            stream = Stream(connection.getresponse(), open_socket)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"no server answers at {self.url}: {reason}") from None
        if stream.status != 200:
            with contextlib.closing(stream):
                raise ServerError(_message_of(stream), status=stream.status)
        return stream


class Stream:
    """The open answer to one request. ``close`` may be called by any thread, also while another one reads."""

    def __init__(self, response: http.client.HTTPResponse, open_socket: socket.socket):
        self._response, self._socket = response, open_socket
        self.status = response.status
        self.is_closed = False

    def text(self) -> str:
        """Return the whole body."""
        return self._response.read().decode("utf-8", errors="replace")

    def json(self):
        """Return the body as JSON; None if it is something else."""
        try:
            return json.loads(self.text())
        except ValueError:
            return None

    def __iter__(self) -> Iterator[dict]:
        """Yield the chunks up to ``[DONE]``; end quietly when ``close`` was called.

        Raises:
            ServerError: the server sent an error or something that is no chunk, or ended before ``[DONE]``.
        """
        try:
            for data in self._events():
                if data == "[DONE]":
                    return
                yield _as_chunk(data)
            problem = "the server ended its answer early"
        except (OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: a read after the response was closed.
            if isinstance(error, ServerError):
                raise
            is_silent = isinstance(error, TimeoutError)
            problem = f"no word from the server for {SILENCE_S:.0f} s" if is_silent else "the connection broke off"
        if not self.is_closed:
            raise ServerError(problem)

    def _events(self) -> Iterator[str]:
        lines: list[str] = []
        while raw := self._response.readline():
            line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            if not line and lines:
                yield "\n".join(lines)
                lines = []
            elif line.startswith("data:"):
                lines.append(line.removeprefix("data:").removeprefix(" "))
        if lines:
            yield "\n".join(lines)

    def close(self) -> None:
        """Close the connection: a server that is still answering cancels, a thread that reads here comes to an end."""
        self.is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads; closing alone would not
        self._socket.close()  # the response keeps its own handle until that thread lets it go


def _as_chunk(data: str) -> dict:
    try:
        chunk = json.loads(data)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ServerError(f"the server sent something that is no chunk of an answer: {data[:80]!r}")
    if chunk.get("error"):
        raise ServerError(_error_text(chunk["error"]))
    return chunk


def _message_of(stream: Stream) -> str:
    """Return what a refusal says: OpenAI's error body, or else the beginning of the text."""
    text = stream.text()
    try:
        return f"{_error_text(json.loads(text)['error'])} ({stream.status})"
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {stream.status}: {text.strip()[:200] or 'nothing'}"


def _error_text(error) -> str:
    return str(error.get("message") or error) if isinstance(error, dict) else str(error)
