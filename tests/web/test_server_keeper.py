"""A server is found, or started and stopped; one that dies is reported with its output, and not started again."""

import sys
from pathlib import Path

import pytest

from minillm.errors import UserError
from minillm.web.client import Client
from minillm.web.server import ServerKeeper

PROGRAM = Path(__file__).with_name("fake_server.py")


def keeper(port: int, *flags: str, **options) -> ServerKeeper:
    command = [sys.executable, str(PROGRAM), "--port", str(port), *flags]
    return ServerKeeper(Client(f"http://127.0.0.1:{port}", api_key="k"), command, api_key="k", **options)


def test_a_running_server_is_used(server):
    keeper = ServerKeeper(Client(server.url), ["false"])
    keeper.ensure()
    assert keeper.process is None


def test_a_server_is_started_once_and_stopped(free_port):
    started = keeper(free_port)
    started.ensure()
    process = started.process
    started.ensure()
    assert started.process is process
    assert process.poll() is None
    assert started.client.models(), "both know the key"
    assert "k" not in process.args
    started.stop()
    assert process.poll() is not None
    assert not started.client.is_up()


def test_a_server_that_dies_is_reported_with_its_output(free_port):
    dying = keeper(free_port, "--die")
    with pytest.raises(UserError, match=r"(?s)ended with exit code 1:\nfake server.*there is no such model"):
        dying.ensure()
    process = dying.process
    with pytest.raises(UserError, match="there is no such model"):
        dying.ensure()
    assert dying.process is process, "it must not be started by every click"
    dying.command = dying.command[:-1]
    dying.forget_failure()
    dying.ensure()
    # It answers, then it is killed.
    dying.process.kill()
    dying.process.wait()
    with pytest.raises(UserError, match="ended with exit code -9"):
        dying.ensure()


def test_a_server_that_never_answers(free_port):
    silent = ServerKeeper(Client(f"http://127.0.0.1:{free_port}"), [], start_s=0.3)
    silent.command = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)"]
    with pytest.raises(UserError, match=r"(?s)is silent for 0.3 s:"):
        silent.ensure()
    silent.stop()


def test_when_none_may_be_started(free_port):
    with pytest.raises(UserError, match="--start_server 0"):
        ServerKeeper(Client(f"http://127.0.0.1:{free_port}"), []).ensure()
    far = ServerKeeper(Client("http://192.0.2.1:8000"), ["false"])
    far.client.is_up = lambda: False
    with pytest.raises(UserError, match="only one on this machine"):
        far.ensure()
