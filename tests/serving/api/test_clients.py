"""Clients that leave, do not read, or come in crowds; each leaves the engine as it was."""

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest

from minillm.serving.api import create_app, service, worker
from tests.serving.api.conftest import KEY, running

ASK = {"messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
HEADERS = {"Authorization": f"Bearer {KEY}"}


def until(condition, within_s=20):
    """Wait for a condition; return whether it came."""
    end = time.monotonic() + within_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# ---- vanished and slow -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_and_its_pages_are_free(address, engine, idle, stream):
    before = idle()
    engine.pause_s = 0.02  # 500 tokens would take 10 s
    n_new = engine.stats.n_new_tokens
    body = json.dumps(ASK | {"stream": stream, "n": 2}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert until(lambda: engine.stats.n_running == 2)
    assert until(lambda: not engine.has_work, within_s=3)
    assert engine.pool.n_free == before
    assert engine.stats.n_new_tokens - n_new < 300


def test_a_client_that_leaves_while_it_waits(address, engine, idle):
    idle()
    engine.pause_s = 0.02
    path, all_rows = "/v1/chat/completions", ASK | {"stream": True, "n": 16}
    with httpx.Client(base_url=address, headers=HEADERS) as client, client.stream("POST", path, json=all_rows) as first:
        next(first.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            client.post(path, json=ASK, timeout=0.3)
        assert until(lambda: engine.stats.n_waiting == 0)
    assert until(lambda: not engine.has_work, within_s=3)


def test_a_half_sent_body_is_dropped(address, idle):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
        )
        time.sleep(0.05)
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


def test_a_slow_reader_does_not_hold_the_others_up(address, engine, client, idle, single):
    """It takes no byte: its answers are written into the sockets' buffers, and then it is given up."""
    idle()
    body = json.dumps(ASK | {"stream": True, "n": 16, "logprobs": True, "top_logprobs": 20}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert until(lambda: engine.stats.n_running == 16)
        answer = client.chat.completions.create(model="tiny", **ASK, max_tokens=5)
        assert answer.choices[0].message.content == single("Who are you?", max_new_tokens=5).text
        idle()
        connection.settimeout(10)
        received = b""
        time.sleep(2.5)  # send_timeout_s is 2
        while part := connection.recv(2**16):
            received += part
        assert b"[DONE]" not in received


def test_a_reader_that_is_too_far_behind_is_given_up(monkeypatch):
    monkeypatch.setattr(worker, "MAX_UNREAD", 3)

    class Request:
        finish_reason, is_cancelled = None, False

        def cancel(self):
            self.is_cancelled = True

    async def read():
        request = Request()
        stream = worker.Stream([request])
        for _ in range(3):
            stream.add(worker.Update(0, "a", [1], [], None))
        assert not request.is_cancelled
        assert (await anext(stream.updates())).text == "a"
        stream.add(worker.Update(0, "a", [1], [], None))
        stream.add(worker.Update(0, "a", [1], [], None))
        assert request.is_cancelled
        with pytest.raises(worker.ApiError, match="behind"):
            [update async for update in stream.updates()]
        assert not stream.is_open

    asyncio.run(read())


def test_a_stream_that_waits_says_so(address, engine, monkeypatch):
    """Proxies close connections without a byte for a minute."""
    monkeypatch.setattr(service, "KEEP_ALIVE_S", 0.05)
    engine.pause_s = 0.3
    body = ASK | {"stream": True, "max_tokens": 2}
    lines = httpx.post(f"{address}/v1/chat/completions", json=body, headers=HEADERS, timeout=30).text.splitlines()
    assert sum(line.startswith(": ") for line in lines) > 2
    assert all(line.startswith((": ", "data: ")) for line in lines if line)
    assert lines[-2] == "data: [DONE]"


# ---- crowds ------------------------------------------------------------------------------------------------------


def test_nothing_is_lost_or_mixed_up_among_many_clients(address, engine, single, idle):
    """60 clients, some of which leave; each answer equals its single run, and the memory is back at the end."""
    before = idle()
    questions = [f"Question {n % 17}: {'why ' * (n % 7)}?" for n in range(60)]
    expected = {question: single(question, max_new_tokens=24).text for question in set(questions)}

    async def ask(client, number, question):
        messages = [{"role": "user", "content": question}]
        options = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 24}
        if number % 3 == 0:
            answer = await client.chat.completions.create(**options)
            return answer.choices[0].message.content
        text = ""
        async with await client.chat.completions.create(**options, stream=True) as chunks:
            async for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                if number % 5 == 1 and text:
                    return None  # leaves
        return text

    async def crowd():
        http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=60)
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, http_client=http) as client:
            return await asyncio.gather(*(ask(client, n, question) for n, question in enumerate(questions)))

    for question, text in zip(questions, asyncio.run(crowd()), strict=True):
        assert text is None or text == expected[question]
    assert idle() == before


# ---- what is told about the server --------------------------------------------------------------------------------


def test_metrics(address, client, engine, idle):
    client.chat.completions.create(model="tiny", **ASK, max_tokens=5)
    idle()
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(figures["minillm_new_tokens_total"]) == engine.stats.n_new_tokens > 0
    assert float(figures["minillm_requests_running"]) == float(figures["minillm_requests_waiting"]) == 0
    assert float(figures["minillm_pages"]) == 200
    assert float(figures["minillm_pages_in_use"]) == 0
    assert float(figures["minillm_cached_tokens_total"]) >= 0
    assert float(figures["minillm_time_to_first_token_seconds_count"]) >= 1
    path = 'minillm_http_requests_total{path="/v1/chat/completions",status="200"}'
    assert float(figures[path]) >= 1
    httpx.get(f"{address}/made/up/{time.time()}", headers=HEADERS)
    text = httpx.get(f"{address}/metrics").text
    assert 'path="other"' in text
    assert "made/up" not in text


def test_log_lines_have_no_content_unless_asked(engine, caplog):
    for log_content in (False, True):
        app = create_app(type(engine)(engine.model, engine.tokenizer, n_pages=50), log_content=log_content)
        caplog.clear()
        with caplog.at_level("INFO", logger="minillm.serving"), running(app, grace_s=1) as (address, _):
            body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 3, "stream": True}
            httpx.post(f"{address}/v1/chat/completions", json=body, headers={"X-Request-Id": "r1"})
        (fields,) = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("new_tokens")]
        assert (fields["request_id"], fields["status"], fields["new_tokens"]) == ("r1", 200, 3)
        assert fields["finish_reasons"] == ["length"]
        assert 0 < fields["first_token_s"] <= fields["seconds"]
        assert ("my secret" in json.dumps(fields)) == log_content


def test_browsers_may_ask_only_from_pages_that_are_named(address, engine):
    preflight = {"Origin": "https://page", "Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "authorization"}  # fmt: skip
    answer = httpx.options(f"{address}/v1/models", headers=preflight)
    assert "access-control-allow-origin" not in answer.headers
    app = create_app(
        type(engine)(engine.model, engine.tokenizer, n_pages=50), api_key=KEY, cors_origins=("https://page",)
    )
    with running(app, grace_s=1) as (other, _):
        answer = httpx.options(f"{other}/v1/models", headers=preflight)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://page")
        assert httpx.get(f"{other}/v1/models", headers={"Origin": "https://page"}).status_code == 401


# ---- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace_s", [20, 0.3])
def test_what_runs_at_the_end_finishes_or_comes_back_with_what_it_has(engine, single, grace_s):
    own = type(engine)(engine.model, engine.tokenizer, n_pages=200)
    own.pause_s = 0.02
    expected = single("Who are you?", max_new_tokens=60).text
    with running(create_app(own, model_name="tiny"), grace_s=grace_s) as (address, server):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        chunks = client.chat.completions.create(model="tiny", **ASK, max_tokens=60, stream=True)
        text = next(chunks).choices[0].delta.content
        with httpx.Client(base_url=address) as kept:  # a connection that stays open
            assert kept.get("/health").status_code == 200
            server.should_exit = True
            for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
        assert chunk.choices[0].finish_reason == "length"
        if grace_s > 1:
            assert text == expected
        else:
            assert expected.startswith(text)
            assert 0 < len(text) < len(expected)
        with pytest.raises(openai.APIConnectionError):
            client.chat.completions.create(model="tiny", **ASK)
    assert not own.has_work
    assert own.pool.n_free == 200
