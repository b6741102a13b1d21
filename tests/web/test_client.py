"""Chunks arrive as they were sent, however the bytes were cut; refusals and breaks are errors; closing cancels."""

import threading
import time

import pytest

from minillm.errors import UserError
from minillm.web.client import Client, ServerError
from tests.web.fake_server import FakeServer


def request(question: str, **fields) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": question}]} | fields


def text_of(chunks) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])


def test_chunks_arrive_as_they_were_sent(server):
    client = Client(server.url + "/")
    chunks = list(client.stream_chat(request("你好 🙂, all of you")))
    assert text_of(chunks) == "You said: 你好 🙂, all of you (1 messages, tiny) "
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert server.requests == [request("你好 🙂, all of you", stream=True)]


def test_models_and_health(server, free_port):
    client = Client(server.url + "/v1")  # as other clients write it
    assert client.is_up()
    assert [model["id"] for model in client.models()] == ["tiny", "cook"]
    assert not Client(f"http://127.0.0.1:{free_port}").is_up()


def test_the_key_is_sent():
    fake = FakeServer(api_key="secret")
    assert Client(fake.url).is_up()  # something answers, if only with a refusal
    with pytest.raises(ServerError, match=r"wrong API key \(401\)"):
        Client(fake.url, api_key="other").models()
    assert Client(fake.url, api_key="secret").models()
    fake.close()


@pytest.mark.parametrize(
    "question, message",
    [
        ("refuse", r"9 tokens too many \(400\)"),
        ("crash", "status 500: <html>"),
        ("break", "the connection broke off|ended its answer early"),
        ("error", "the model ran out of memory"),
        ("garbage", "no chunk of an answer: '{not json'"),
    ],
)
def test_what_goes_wrong_is_said(server, question, message):
    with pytest.raises(ServerError, match=message):
        list(Client(server.url).stream_chat(request(question)))


def test_no_server(free_port):
    with pytest.raises(ServerError, match=f"no server answers at http://127.0.0.1:{free_port}: Connection refused"):
        Client(f"http://127.0.0.1:{free_port}").models()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "ftp://host", "http://host:99999", "http://host:0", ""])
def test_addresses_that_are_none(url):
    with pytest.raises(UserError, match="is not the address of a server"):
        Client(url)


@pytest.mark.parametrize("question", ["slow", "silent"])
def test_closing_ends_the_reader_and_tells_the_server(server, question):
    stream, chunks = Client(server.url).stream_chat(request(question)), []
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    time.sleep(0.2)
    stream.close()
    reader.join(2)
    assert not reader.is_alive()
    assert question == "silent" or "word0" in text_of(chunks) or not chunks
    end = time.monotonic() + 5
    while not server.n_vanished and time.monotonic() < end:
        time.sleep(0.02)
    assert server.n_vanished == 1
