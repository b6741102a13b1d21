"""Ranks, and the engine that turns local gradients into global ones.

``Engine`` is the small face between ``Run`` and whatever averages the gradients. It has three bodies: here one process
or DDP, FSDP2 in ``fsdp.py``, DeepSpeed's ZeRO in ``zero.py``. Every engine *averages* over ranks, which is why ``Run``
multiplies the loss by the number of ranks before it divides by the global count of targets.
"""

import contextlib
import datetime
import inspect
import os
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm import precision
from minillm.distributed.rendezvous import meeting_store
from minillm.errors import UserError

SIGN_OF_LIFE_S = 10.0  # the main rank gives one so often while it works alone
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch names them


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
        self._n_alone = 0  # times that the main rank has worked alone

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
        store = meeting_store(self.rank, self.world_size, timeout)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timeout)
        self._started_here = True
        self._store, self._timeout_s = store, timeout.total_seconds()
        # Every agent of torchrun counts its own failures: what one of them knows, all must.
        self.is_restart = any(self.gather(self.is_restart))

    def stop(self) -> None:
        """Leave the process group, if it was joined here."""
        if self._started_here and dist.is_initialized():
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

    def main_alone(self, build):
        """Run ``build()`` on rank 0 while the others wait; return its result, None elsewhere. All raise if it fails.

        It may take longer than the timeout of the group: the others wait for as long as rank 0 gives signs of life.
        """
        result = error = None
        self._n_alone += 1
        if self.is_main:
            with self._signs_of_life():
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
    def _signs_of_life(self):
        """Tell the others in the store, every few seconds, that this process is alive, and at last that it is done."""
        if self._store is None or self.world_size == 1:
            yield
            return
        done = threading.Event()

        def tell() -> None:
            while not done.wait(min(SIGN_OF_LIFE_S, self._timeout_s / 4)):
                self._store.add(f"minillm alone {self._n_alone}", 1)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._store.set(f"minillm alone {self._n_alone} done", "")

    def _wait_for_main(self) -> None:
        """Wait until rank 0 is done with what it does alone; raise UserError when it gives no sign of life."""
        if self._store is None:
            return
        name, n_signs, since, pause_s = f"minillm alone {self._n_alone}", 0, time.monotonic(), 0.01
        while not self._store.check([f"{name} done"]):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
            if (n := self._store.add(name, 0)) != n_signs:
                n_signs, since = n, time.monotonic()
            if time.monotonic() - since > self._timeout_s:
                minutes = self._timeout_s / 60
                raise UserError(f"rank 0 has given no sign of life for {minutes:g} minutes (--timeout_minutes)")

    def main_first(self, build):
        """Return ``build()``, run on rank 0 before the others, so that these find its files ready."""
        result = self.main_alone(build)
        return result if self.is_main else build()


class Engine:
    """One process, or DDP over several: gradients averaged over ranks, clipped, applied.

    Attributes:
        module: what ``forward`` is called on.
        is_sharded: whether no rank holds the whole model.
        trains_model: whether the model itself has the master weights; else they come by ``weights`` alone.
        places_model: whether ``wrap`` brings the model to the device, block by block.
        needs_group: whether even a single rank needs a process group.
        shows_gradients: whether every rank has all gradients, in ``parameter.grad``.
    """

    is_sharded = needs_group = places_model = False
    trains_model = shows_gradients = True

    def __init__(self, ranks: Ranks, scaler: torch.amp.GradScaler, args=None, dtype: torch.dtype = torch.float32):
        self.ranks, self.scaler, self.args, self.dtype = ranks, scaler, args, dtype
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the module to train: ``model`` itself, or wrapped for the ranks. Comes before the optimizer."""
        self.module = model
        if self.ranks.world_size > 1:
            ids = [device.index] if device.type == "cuda" else None
            ddp = nn.parallel.DistributedDataParallel
            # Buffers (the routers' correction biases) change with all-reduced counts: they are equal on every rank.
            known = inspect.signature(ddp).parameters
            flag = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its old name
            self.module = ddp(model, device_ids=ids, gradient_as_bucket_view=True, **{flag: False})
        return self.module

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Take the optimizer; return the module whose forward the loop calls."""
        self.optimizer = optimizer
        return self.module

    def autocast(self, device: torch.device):
        """Return the context of a forward pass in the run's dtype."""
        return precision.autocast(device, self.dtype)

    def set_last(self, is_last: bool) -> None:
        """Say, before a forward pass, whether its backward ends the step: only then gradients are averaged."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            self.module.require_backward_grad_sync = is_last

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss`` (scaled under float16)."""
        self.scaler.scale(loss).backward()

    def clip(self, max_norm: float) -> Tensor:
        """Unscale, then clip the gradients to a global norm of ``max_norm`` (0: do not); return the norm before.

        The order matters: clipping scaled gradients would clip by a norm that is tens of thousands too large.
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))

    def step(self) -> bool:
        """Apply the update and clear the gradients; return whether it was applied (float16 skips overflows)."""
        scale_before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.scaler.get_scale() >= scale_before

    # ---- what a checkpoint keeps ------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float | None:
        """The factor of the loss under float16; None where it is not scaled."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Return what of ``model`` training changes, whole, by name; None on all ranks but the main one.

        All ranks call it together. Master weights: float32, whatever dtype the forward pass has.
        """
        return changing_state(model) if self.ranks.is_main else None

    def optimizer_state(self) -> dict | None:
        """Return the optimizer's ``state_dict`` with whole tensors; None on all ranks but the main one. Together."""
        return self.optimizer.state_dict() if self.ranks.is_main else None

    def shapes(self) -> list[torch.Size]:
        """Return the whole shapes of the optimizer's parameters, in its order."""
        return [parameter.shape for group in self.optimizer.param_groups for parameter in group["params"]]

    def load(self, whole: nn.Module, optimizer_state: dict) -> None:
        """Go on from the weights of ``whole`` (the trained model itself, if no rank holds only parts) and a state."""
        self.optimizer.load_state_dict(optimizer_state)

    def scaler_state(self) -> dict:
        """Return the state of the loss's scaling; empty where it is not scaled."""
        return self.scaler.state_dict()

    def load_scaler_state(self, state: dict) -> None:
        """Go on from it. A run that goes on in another dtype begins its scaling anew."""
        if "scale" in state and self.scaler.is_enabled():  # DeepSpeed's has other names
            self.scaler.load_state_dict(state)


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the buffers of ``model`` by name, as they are; tied ones once."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.state_dict().items() if name not in parameters}


class StepBatchesOnDevice:
    """The micro-batches of one update: iterating moves each to the device and tells the engine which is the last."""

    def __init__(self, micro_batches: list[dict[str, Tensor]], device: torch.device, engine: Engine):
        self.micro_batches, self.device, self.engine = micro_batches, device, engine

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index, batch in enumerate(self.micro_batches):
            self.engine.set_last(index == len(self.micro_batches) - 1)
            yield {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
