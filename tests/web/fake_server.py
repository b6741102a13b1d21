"""A server that speaks OpenAI's protocol without a model, with all the oddities that clients have to bear.

What it answers depends on the first word of the last question; see ``_pieces``. As a program it stands in for
``serve_api.py``: python tests/web/fake_server.py --host 127.0.0.1 --port 8000
"""

import contextlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODELS = [{"id": "tiny", "object": "model"}, {"id": "cook", "object": "model", "parent": "tiny"}]


class FakeServer:
    """Runs in threads of this process.

    Attributes:
        requests: the bodies of all chat completions. n_vanished: clients that left during an answer.
    """

    def __init__(self, port: int = 0, *, api_key: str = ""):
        self.requests: list[dict] = []
        self.n_vanished = 0
        self.api_key = api_key
        self.delay_s = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._server.daemon_threads, self._server.fake = True, self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def fake(self) -> FakeServer:
        return self.server.fake

    def do_GET(self):
        answers = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": MODELS},
            "/seen": {"n_requests": len(self.fake.requests), "n_vanished": self.fake.n_vanished},
        }
        if self._is_allowed():
            self._send(200, answers[self.path])

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        self.fake.requests.append(body)
        word = _question(body).partition(" ")[0]
        if word == "refuse":
            return self._send(400, {"error": {"message": "the prompt has 9 tokens too many", "type": "bad"}})
        if word == "crash":
            return self._send(500, "<html>Internal Server Error</html>")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for piece in _pieces(word, body):
                self._write(piece)
                time.sleep(self.fake.delay_s)
            if word != "break":
                self._write("data: [DONE]\n\n")
                self._chunk(b"")
        except (BrokenPipeError, ConnectionResetError):
            self.fake.n_vanished += 1
        self.close_connection = True

    def _write(self, piece: dict | str | bytes) -> None:
        if isinstance(piece, dict):
            piece = f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
        raw = piece.encode() if isinstance(piece, str) else piece
        for start in range(0, len(raw), 7):  # cuts characters and lines apart
            self._chunk(raw[start : start + 7])

    def _chunk(self, raw: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))

    def _is_allowed(self) -> bool:
        if self.fake.api_key and self.headers["Authorization"] != f"Bearer {self.fake.api_key}":
            self._send(401, {"error": {"message": "wrong API key"}})
            return False
        return True

    def _send(self, status: int, body: dict | str) -> None:
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def _pieces(word: str, body: dict):
    """Yield the chunks of an answer, or raw text where the oddity is in the text."""
    messages, wants_tokens = body["messages"], body.get("logprobs")
    yield ": a comment, as servers send to keep a connection open\r\n\r\n"
    yield _chunk({"role": "assistant", "content": ""})
    if word == "think":
        for text in ("Let ", "me ", "see."):
            yield _chunk({"reasoning_content": text})
    if word == "slow":
        for number in range(600):
            yield _chunk({"content": f"word{number} "})
            time.sleep(0.05)
    if word == "silent":
        for _ in range(600):
            time.sleep(0.05)
            yield ": nothing yet\n\n"
    if word == "break":
        yield _chunk({"content": "half an ans"})
        return
    if word == "error":
        yield _chunk({"content": "so far"})
        yield {"error": {"message": "the model ran out of memory", "code": 500}}
        return
    if word == "garbage":
        yield "data: {not json\n\n"
    if word == "odd":
        yield {"choices": 7}
    if body.get("tools") and (word == "loop" or (word == "tool" and messages[-1]["role"] == "user")):
        arguments = '{"expression": "6*7"}'
        yield _chunk({"tool_calls": [_call(0, "call_a", body["tools"][0]["function"]["name"], "")]})
        for start in range(0, len(arguments), 5):
            yield _chunk({"tool_calls": [{"index": 0, "function": {"arguments": arguments[start : start + 5]}}]})
        yield _chunk({}, finish_reason="tool_calls")
        return
    text = f"You said: {_question(body)} ({len(messages)} messages, {body['model']})"
    if messages[-1]["role"] == "tool":
        text = f"The tool says {messages[-1]['content']}."
    if word == "html":
        text = "<script>document.title='broken'</script> ![x](http://127.0.0.1:1/leak.png) **bold** 你好"
    for part in text.split(" "):
        yield _chunk({"content": part + " "}, tokens=[_token(part + " ")] if wants_tokens else None)
    yield _chunk({}, finish_reason="length" if word == "long" else "stop")
    yield {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}}


def _question(body: dict) -> str:
    return next(message["content"] for message in reversed(body["messages"]) if message["role"] == "user")


def _chunk(delta: dict, *, finish_reason: str | None = None, tokens: list[dict] | None = None) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    choice |= {"logprobs": {"content": tokens}} if tokens else {}
    return {"object": "chat.completion.chunk", "choices": [choice]}


def _call(index: int, call_id: str, name: str, arguments: str) -> dict:
    return {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _token(text: str) -> dict:
    others = [{"token": text, "logprob": -0.5}, {"token": "<b>&\n", "logprob": -1.5}]
    return {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": others}


if __name__ == "__main__":
    print("fake server", sys.argv[1:], flush=True)
    key = os.environ.get("MINILLM_API_KEY", "")
    if "--die" in sys.argv:
        sys.exit("error: --model nothing: there is no such model")
    with contextlib.suppress(KeyboardInterrupt):
        FakeServer(int(sys.argv[sys.argv.index("--port") + 1]), api_key=key)
        threading.Event().wait()
