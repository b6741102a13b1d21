"""The ranks of a run: this process among all, and the collectives that a run needs."""

import contextlib
import datetime
import os
import threading
import time

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.rendezvous import rendezvous_store
from minillm.errors import UserError

HEARTBEAT_S = 10.0  # seconds between signs of life of the main rank while it works alone


class Ranks:
    """This process among all: ``rank``, ``world_size``, ``local_rank``, and the few collectives that ``Run`` needs."""

    def __init__(self):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # torchrun's, after a failure
        self._started_here = False
        self._store: dist.Store | None = None
        self._timeout_s = 0.0
        self._n_main_calls = 0  # times that the main rank has worked alone

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes files and prints."""
        return self.rank == 0

    def start(self, device: torch.device, *, timeout_minutes: float = 30.0, alone: bool = False) -> None:
        """Join the process group (nccl for cuda, gloo otherwise) when there is more than one rank.

        Args:
            timeout_minutes: how long a rank waits for a sign of the others before it gives up.
            alone: make a group of one rank too, for engines that cannot do without.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if dist.is_initialized() or (self.world_size == 1 and not alone):
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store = rendezvous_store(self.rank, self.world_size, timeout)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self._started_here = True
        self._store, self._timeout_s = store, timeout.total_seconds()
        # Every agent of torchrun counts its own failures: what one of them knows, all must.
        self.is_restart = any(self.gather(self.is_restart))

    def stop(self) -> None:
        """Leave the process group, if it was joined here.

        The pause prevents a deadlock in torch: gloo's thread may still free the tensors of the last collective, for
        which it needs Python's lock, while the group's destructor holds that lock and waits for the thread.
        """
        if self._started_here and dist.is_initialized():
            time.sleep(0.05)
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over all ranks (in place)."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """Return every rank's ``value``, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def on_main_rank(self, build):
        """Run ``build()`` on rank 0 while the others wait; return its result, None elsewhere. All raise if it fails.

        It may take longer than the timeout of the group: the others wait as long as rank 0 gives signs of life.
        """
        result = error = None
        self._n_main_calls += 1
        if self.is_main:
            with self._heartbeats():
                try:
                    result = build()
                except Exception as caught:
                    error = caught
        else:
            self._wait_for_main()
        failures = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        if failures[0] is not None:
            raise UserError(f"rank 0 failed: {failures[0]}")
        return result

    @contextlib.contextmanager
    def _heartbeats(self):
        """Write signs of life to the store every few seconds, and at the end that rank 0 is done."""
        if self._store is None or self.world_size == 1:
            yield
            return
        done = threading.Event()

        def tell() -> None:
            while not done.wait(min(HEARTBEAT_S, self._timeout_s / 4)):
                self._store.add(f"minillm alone {self._n_main_calls}", 1)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._store.set(f"minillm alone {self._n_main_calls} done", "")

    def _wait_for_main(self) -> None:
        """Wait until rank 0 is done; raise UserError when it gives no sign of life."""
        if self._store is None:
            return
        name, n_signs, since, pause_s = f"minillm alone {self._n_main_calls}", 0, time.monotonic(), 0.01
        while not self._store.check([f"{name} done"]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
            if (n := self._store.add(name, 0)) != n_signs:
                n_signs, since = n, time.monotonic()
            if time.monotonic() - since > self._timeout_s:
                minutes = self._timeout_s / 60
                raise UserError(f"rank 0 has given no sign of life for {minutes:g} minutes (--timeout_minutes)")

    def main_rank_first(self, build):
        """Return ``build()`` of every rank. Rank 0 runs it first, so that the others find its files ready."""
        result = self.on_main_rank(build)
        return result if self.is_main else build()
