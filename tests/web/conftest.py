"""A server without a model, and a port that nobody uses."""

import pytest

from tests.web.fake_server import FakeServer
from tests.web.ports import hold_port


@pytest.fixture
def server():
    """A fresh ``FakeServer``."""
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture
def free_port():
    """A port on which nothing listens."""
    with hold_port() as holder:
        yield holder.getsockname()[1]
