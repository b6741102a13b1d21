"""Whatever clients send, they get a status and a message, never 500, and the server goes on."""

import contextlib
import json

import httpx
import pytest

from minillm.serving.api import create_app
from tests.serving.api.conftest import KEY, running

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def http(address):
    """A plain client, for what the real one would not send."""
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def refused(answer, status, *words):
    """Check that an answer is OpenAI's error with a status, and words in its message; return it."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    assert error["message"].encode()  # no lone surrogate, which a client could not print
    return error


def function(**changes):
    return {"type": "function", "function": {"name": "f", **changes}}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": -1}, None, ["temperature -1", "positive"]),
        ({"temperature": "hot"}, "temperature", ["number"]),
        ({"top_p": 0}, None, ["top_p 0"]),
        ({"top_p": 1.5}, None, ["top_p 1.5"]),
        ({"top_k": -2}, None, ["top_k"]),
        ({"min_p": 2}, None, ["min_p"]),
        ({"repetition_penalty": 0}, None, ["repetition_penalty"]),
        ({"repetition_penalty": 1e-300}, None, ["repetition_penalty", "0.001"]),
        ({"repetition_penalty": 1e300}, None, ["repetition_penalty"]),
        ({"temperature": 1e300, "response_format": {"type": "json_object"}}, None, ["temperature", "1,000,000"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, None, ["schema"]),
        ({"presence_penalty": 0.5}, "presence_penalty", ["not supported", "repetition_penalty"]),
        ({"logit_bias": {"5": 3}}, "logit_bias", ["not supported"]),
        ({"n": 0}, "n", ["at least 1"]),
        ({"n": 10**6}, "n", ["at most 128"]),
        ({"n": 10**60}, "n", []),
        ({"max_tokens": 0}, "max_tokens", ["at least 1"]),
        ({"max_tokens": -5}, "max_tokens", []),
        ({"max_tokens": 1.5}, "max_tokens", ["integer"]),
        ({"max_completion_tokens": 0}, "max_completion_tokens", []),
        ({"seed": 2**70}, "seed", ["between"]),
        ({"stop": ""}, "stop", ["characters"]),
        ({"stop": ["x"] * 40}, "stop", ["at most 16"]),
        ({"stop": "x" * 5000}, "stop", []),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", ["20"]),
        ({"messages": []}, None, ["empty"]),
        ({"messages": "Hi"}, "messages", ["list"]),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages.0.role", ["assistant"]),
        ({"messages": [{"role": "user"}]}, None, ["no content"]),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content", []),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0", ["image_url"],
        ),
        ({"messages": [{"role": "user", "content": "Hi", "tool_calls": [{}]}]}, None, ["assistant"]),
        ({"tools": [{"type": "function"}]}, None, ["name"]),
        ({"tools": "add"}, "tools", []),
        ({"tool_choice": "required"}, "tool_choice", ["tools"]),
        ({"tools": [function()], "tool_choice": "sometimes"}, "tool_choice", ["auto"]),
        ({"tools": [function()], "tool_choice": {"function": {"name": "g"}}}, "tool_choice", ["f"]),
        ({"tools": [function(parameters={"type": "nonsense"})], "tool_choice": "required"}, None, ["parameters"]),
        ({"tools": [function()], "response_format": {"type": "json_object"}}, "response_format", ["tools"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["json_object"]),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["required"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            None, ["schema"],
        ),
        ({"stream_options": 3}, "stream_options", []),
    ],
)  # fmt: skip
def test_wrong_values_of_a_chat(http, changes, param, words):
    error = refused(http.post(CHAT, json=ASK | changes), 400, *words)
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"
    streamed = http.post(CHAT, json=ASK | changes | {"stream": True})
    assert refused(streamed, 400)["message"] == error["message"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": []}, ["empty"]), ({"prompt": [[]]}, ["empty"]), ({"prompt": [[1], []]}, ["empty"]),
        ({"prompt": [99999]}, ["99999", "vocabulary"]), ({"prompt": [-1]}, ["-1"]), ({"prompt": [[10**30]]}, []),
        ({"prompt": ["a", 3]}, []), ({"prompt": None}, []), ({"prompt": {"text": "a"}}, []),
        ({"echo": True}, ["echo", "not supported"]), ({"suffix": "end"}, ["suffix"]), ({"best_of": 3}, ["best_of"]),
        ({"logprobs": 21}, ["20"]), ({"logprobs": -1}, ["0"]), ({"prompt": ["a"] * 100, "n": 2}, ["100 prompts"]),
    ],
)  # fmt: skip
def test_wrong_values_of_a_completion(http, changes, words):
    refused(http.post(COMPLETION, json={"prompt": "a", "max_tokens": 2} | changes), 400, *words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["JSON object"]), (b"{", ["JSON"]), (b"[1, 2]", ["JSON object"]), (b"null", ["JSON object"]),
        (b'"text"', ["JSON object"]), (b"7", ["JSON object"]), (b"{}", ["messages: this field is required"]),
        (b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', []),  # broken UTF-8
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', ["surrogate"]),
        (b'{"model": "\\ud83d", "messages": [{"role": "user", "content": "a"}]}', []),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', []),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', []),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": Infinity}', []),
        (b'{"messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 5000 + b"}", []),
        (b"[" * 100_000, []), (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", []),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": [' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"]}",
         []),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(http, body, words):
    answer = http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    refused(answer, answer.status_code, *words)
    assert http.post(CHAT, json=ASK).status_code == 200


def test_a_body_needs_its_content_type(http):
    answer = http.post(CHAT, content=json.dumps(ASK), headers={"Content-Type": "application/x-www-form-urlencoded"})
    refused(answer, 400, "Content-Type: application/json")


def test_null_and_unknown_fields_are_ignored(http):
    body = ASK | dict.fromkeys(["temperature", "n", "stop", "tools", "stream", "logit_bias", "response_format"])
    body |= {"user": "me", "store": True, "metadata": {"a": [1]}, "parallel_tool_calls": False, "top_k": -1}
    assert http.post(CHAT, json=body).status_code == 200


def test_prompts_that_are_too_long(http):
    error = refused(http.post(CHAT, json={"messages": [{"role": "user", "content": "a " * 3000}]}), 400, "512")
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    error = refused(http.post(COMPLETION, json={"prompt": [5] * 512}), 400)
    assert error["code"] == "context_length_exceeded"
    assert http.post(COMPLETION, json={"prompt": [5] * 511, "max_tokens": 5}).json()["usage"]["completion_tokens"] == 1


def test_bodies_that_are_too_large(http):
    refused(http.post(CHAT, content=b" " * (5 * 2**20)), 413, "4,194,304")

    def endless():
        for _ in range(400):
            yield b" " * 2**16

    with contextlib.suppress(httpx.TransportError):  # the server may close the connection while the client still writes
        refused(http.post(CHAT, content=endless()), 413)
    assert http.post(CHAT, json=ASK).status_code == 200


def test_keys(address, http):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"},
                    {"Authorization": f"Bearer {KEY}x"}):  # fmt: skip
        for path in ("/v1/models", "/openapi.json", "/nothing"):
            refused(httpx.get(address + path, headers=headers), 401, "API key")
        answer = httpx.post(address + CHAT, content=b"not even JSON", headers=headers)
        assert refused(answer, 401)["code"] == "invalid_api_key"
    odd = httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer \u00e9".encode("latin-1")})
    refused(odd, 401)
    for path in ("/health", "/metrics"):
        assert httpx.get(address + path).status_code == 200
    assert http.get("/v1/models", headers={"Authorization": f"bearer  {KEY}"}).status_code == 200


def test_unknown_models_and_addresses(http):
    error = refused(http.post(CHAT, json=ASK | {"model": "gpt-4"}), 404, "gpt-4", "tiny")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    refused(http.get("/v1/models/nothing"), 404)
    refused(http.get("/v1/nothing"), 404, "/v1/nothing")
    refused(http.post("/v1/embeddings", json={"input": "a"}), 404)
    refused(http.get(CHAT), 405)
    refused(http.get("/%ff%fe/" + "x" * 3000), 404)


def test_a_client_cannot_forge_ids(http):
    for name in ("a" * 500, "a b", "é"):
        answer = http.get("/health", headers={"X-Request-Id": name.encode()})
        assert answer.headers["x-request-id"] != name


def test_a_full_queue_is_told(http, engine, idle):
    idle()
    n_new = engine.stats.n_new_tokens
    engine.max_queue, before = 3, engine.max_queue
    try:
        error = refused(http.post(CHAT, json=ASK | {"n": 9}), 429, "waiting")
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert http.post(CHAT, json=ASK | {"n": 9}).headers["retry-after"] == "1"
    finally:
        engine.max_queue = before
    free = idle()
    assert engine.stats.n_new_tokens == n_new  # the first three were not begun either
    assert http.post(CHAT, json=ASK).status_code == 200
    assert engine.pool.n_free == free


def test_a_failing_engine_is_no_fault_of_the_client_and_not_its_end(http, engine, idle):
    engine.pause_s, engine.script = 0.05, "a long answer that goes on and on"
    with http.stream("POST", CHAT, json=ASK | {"stream": True, "max_tokens": 30}) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        once(engine, RuntimeError("out of memory"))
        events = [line.removeprefix("data: ") for line in lines if line]
    assert json.loads(events[-1])["error"]["type"] == "server_error"
    assert "[DONE]" not in events
    once(engine, RuntimeError("out of memory"))
    refused(http.post(CHAT, json=ASK), 500, "engine")
    idle()
    assert http.post(CHAT, json=ASK).status_code == 200
    assert http.get("/health").json() == {"status": "ok"}


def test_an_engine_that_cannot_go_on_says_so(engine):
    own = type(engine)(engine.model, engine.tokenizer, n_pages=50)
    own.error = RuntimeError("device lost")
    with running(create_app(own), grace_s=1) as (address, _):
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        refused(httpx.post(address + CHAT, json=ASK), 500, "engine")
        answer = httpx.get(f"{address}/health")
        assert (answer.status_code, answer.json()) == (503, {"status": "failed"})
        refused(httpx.post(address + CHAT, json=ASK), 500, "restarted")


def once(engine, error):
    """Let the next step fail."""

    def step():
        del engine.step
        raise error

    engine.step = step
