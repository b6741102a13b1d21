"""Ranks that were restarted meet under one number, whatever the dead ones left in the agents' store."""

import datetime
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from minillm.distributed.rendezvous import agree_on_attempt, rendezvous_store
from minillm.errors import UserError

SHORT = datetime.timedelta(seconds=20)


@pytest.fixture
def agents():
    """The store of torchrun's agents; call it for a worker's own connection."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    connect = lambda: dist.TCPStore("localhost", port, is_master=False, timeout=SHORT)  # noqa: E731
    connect.server, connect.port = server, port
    return connect


def attempt(agents, world_size: int, *, missing: tuple[int, ...] = (), timeout=SHORT) -> list[int]:
    """Start all ranks but the missing ones side by side; return what each takes for the attempt's number."""
    ranks = [rank for rank in range(world_size) if rank not in missing]
    with ThreadPoolExecutor(len(ranks)) as pool:
        found = [pool.submit(agree_on_attempt, agents(), rank, world_size, timeout) for rank in ranks]
        return [future.result() for future in found]


def test_every_attempt_has_a_number_of_its_own(agents):
    assert [attempt(agents, 3) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]
    assert attempt(agents, 2) == [4, 4]  # a node less
    assert attempt(agents, 1) == [5]


def test_what_the_dead_left_is_not_taken_for_the_living(agents):
    """Two ranks of an attempt died while they waited, one of them before it had said its name."""
    store = agents()
    store.set(f"minillm attempt asks {store.add('minillm attempt asks', 1)}", "name of a dead one")
    store.add("minillm attempt asks", 1)
    assert attempt(agents, 3) == [1, 1, 1]
    assert attempt(agents, 3) == [2, 2, 2]


def test_a_missing_rank_is_said(agents):
    with pytest.raises(UserError, match="not all 3 ranks came within 0:00:01: is a node missing"):
        attempt(agents, 3, missing=(2,), timeout=datetime.timedelta(seconds=1))
    assert attempt(agents, 3) == [2, 2, 2]


def test_ranks_meet_in_the_corner_of_their_attempt(agents, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(agents.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for word in ("first", "second"):
        with ThreadPoolExecutor(2) as pool:
            stores = list(pool.map(lambda rank: rendezvous_store(rank, 2, SHORT), range(2)))
        assert not stores[1].check(["word"])  # what the attempt before has written is not seen
        stores[0].set("word", word)
        assert stores[1].get("word").decode() == word


def test_alone_without_a_launcher(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert isinstance(rendezvous_store(0, 1, SHORT), dist.HashStore)
