"""A server without a model, and a port that nobody uses."""

import socket

import pytest

from tests.web.fake_server import FakeServer


@pytest.fixture
def server():
    """A fresh ``FakeServer``."""
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
