"""What stands around every HTTP request: an id, the API key, limits, the log line, and the end of what it started.

Plain ASGI (https://asgi.readthedocs.io): ``receive`` gives the parts of the body and the news that the client has left,
``send`` takes the parts of the answer and waits while the client does not read.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from minillm.serving.api.errors import CLIENT_LEFT, ApiError, as_api_error
from minillm.serving.api.metrics import Metrics
from minillm.serving.api.worker import Stream

OPEN_PATHS = ("/health", "/metrics")  # need no key
REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # a client's own id: visible ASCII
log = logging.getLogger(__name__)


@dataclass
class Trace:
    """What is known about one HTTP request; the endpoints find it as ``request.state.trace``."""

    id: str
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    stream: Stream | None = None
    """What the engine does for it; cancelled when the request ends in any way."""
    first_token_s: float | None = None
    """From the arrival to the first token."""
    describe: Callable[[], dict] = dict
    """Returns more for its log line."""

    def seconds(self) -> float:
        """Return the time since the request arrived."""
        return time.perf_counter() - self.began


class Guard:
    """The outermost part of the app. Whatever ends a request, an error too, comes by here.

    Args:
        api_key: clients must send it as ``Authorization: Bearer KEY``; "": no key is needed.
        max_body_bytes: a longer body is refused with 413.
        send_timeout_s: a client that takes no byte for so long is given up.
    """

    def __init__(self, app, *, metrics: Metrics, api_key: str, max_body_bytes: int, send_timeout_s: float):
        self.app, self.metrics = app, metrics
        self._key, self._max_body_bytes, self._send_timeout_s = api_key.encode(), max_body_bytes, send_timeout_s

    async def __call__(self, scope, receive, send):
        """Handle a request (``http``); pass everything else on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        own_id = headers.get(b"x-request-id", b"")
        trace = Trace(own_id.decode() if REQUEST_ID.fullmatch(own_id) else uuid.uuid4().hex)
        scope.setdefault("state", {})["trace"] = trace

        async def send_in_time(message):
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", trace.id.encode())]
            try:
                await asyncio.wait_for(send(message), self._send_timeout_s)
            except asyncio.TimeoutError:
                raise ApiError(CLIENT_LEFT, f"the client took nothing for {self._send_timeout_s:g} s") from None

        try:
            self._check_key(scope["path"], headers.get(b"authorization", b""))
            body = await self._read_body(receive)
            await self.app(scope, _replay(body, receive), send_in_time)
        except Exception as error:
            has_begun = bool(trace.status)  # then the answer can only break off
            answer = as_api_error(error)
            trace.status = answer.status
            if answer is not error and answer.status == 500:
                log.error("a request failed", exc_info=error, extra={"fields": {"request_id": trace.id}})
            if not has_begun and answer.status != CLIENT_LEFT:
                await _answer(send_in_time, answer)
        finally:
            self._end(scope, trace)

    def _check_key(self, path: str, authorization: bytes) -> None:
        if not self._key or path in OPEN_PATHS:
            return
        scheme, _, key = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            message = "the API key is missing or wrong: send the header 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    async def _read_body(self, receive) -> bytes:
        """Return the body; no more of it is read than the limit allows."""
        body, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_LEFT, "the client left while it sent its body")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                limit = f"{self._max_body_bytes:,} bytes, the server's limit (--max_body_mb)"
                raise ApiError(413, f"the body has more than {limit}: send less", code="request_too_large")
            has_more = message.get("more_body", False)
        return bytes(body)

    def _end(self, scope, trace: Trace) -> None:
        """End what the engine still does for the request, count it and write its log line."""
        if trace.stream is not None and trace.stream.is_open and trace.status < 400:
            trace.status = CLIENT_LEFT
        if trace.stream is not None:
            trace.stream.cancel()
        route = getattr(scope.get("route"), "path", "other")  # not the path: clients could make up any number of them
        self.metrics.requests.labels(route, str(trace.status or CLIENT_LEFT)).inc()
        fields = {"request_id": trace.id, "method": scope["method"], "path": scope["path"][:200]}
        fields |= {"status": trace.status or CLIENT_LEFT, "seconds": round(trace.seconds(), 4), **trace.describe()}
        log.info("request", extra={"fields": fields})


def _replay(body: bytes, receive):
    """Return a ``receive`` that gives the whole body first."""
    is_read = False

    async def replay():
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
