"""Where the ranks meet: the launcher's store, with a corner for each attempt of torchrun."""

import datetime
import os
import time
import uuid

import torch.distributed as dist

from minillm.errors import UserError


def rendezvous_store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """Return where the ranks of this attempt find each other."""
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt {agree_on_attempt(store, rank, world_size, timeout)}", store)


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> int:
    """Return the number of this attempt in the store of torchrun's agents, which outlives the workers. Together.

    Restarted workers would otherwise read what the dead ones left there; and no variable tells all of them the same
    number, since each agent counts its own failures. So rank 0 takes the next number and tells it to everyone who
    asks, under a name that only the asking one knows, until all of them are here.
    """
    prefix = "minillm attempt"
    if rank:
        name = uuid.uuid4().hex
        store.set(f"{prefix} asks {store.add(f'{prefix} asks', 1)}", name)
        attempt = int(store.get(f"{prefix} for {name}"))
        store.set(f"{prefix} {attempt} has {rank}", "")
        return attempt
    attempt, open_questions, n_asked = store.add(prefix, 1), [], 0
    end = time.monotonic() + timeout.total_seconds()
    while not all(store.check([f"{prefix} {attempt} has {other}"]) for other in range(1, world_size)):
        if time.monotonic() > end:
            raise UserError(f"not all {world_size} ranks came within {timeout}: is a node missing? (--timeout_minutes)")
        n = store.add(f"{prefix} asks", 0)
        open_questions += range(n_asked + 1, n + 1)
        n_asked = n
        for number in [number for number in open_questions if store.check([f"{prefix} asks {number}"])]:
            open_questions.remove(number)
            store.set(f"{prefix} for {store.get(f'{prefix} asks {number}').decode()}", str(attempt))
        time.sleep(0.01)
    return attempt
