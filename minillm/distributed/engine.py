"""The engine: where and in which dtype a model computes, and how the gradients of all ranks become one update.

``Engine`` has three implementations: here one process or DDP, FSDP2 in ``fsdp.py``, DeepSpeed's ZeRO in ``zero.py``.
Every engine *averages* gradients over ranks, which is why ``Step.backward`` multiplies the loss by the number of ranks
before it divides by the global count of targets.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minillm import precision
from minillm.distributed.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch names them


class Engine:
    """One process, or DDP over several: gradients averaged over ranks, clipped, applied.

    Args:
        device, dtype: of the forward pass. args: the run's arguments, for engines with settings of their own.

    Attributes:
        module: what ``forward`` is called on.
        sum_dtype: of sums over the targets of a step.
        is_sharded: whether no rank holds the whole model.
        holds_master_weights: whether the model's own parameters are the master weights (else see ``weights``).
        places_model: whether ``wrap`` moves the model to the device, block by block.
        needs_group: whether even a single rank needs a process group.
        has_whole_gradients: whether every rank has all gradients, in ``parameter.grad``. An engine without them has
            ``gradient``, ``set_gradient``, ``adam_state`` and ``gathered``, which all ranks call together.
        clips_in_update: whether ``clip`` also updates, so that the gradients are gone after it.
        gradient_scale: what ``clip`` has multiplied the gradients with since they could be seen.
        reads_late: whether the run looks at a step's numbers while the next step computes (see ``step``).
    """

    is_sharded = needs_group = places_model = clips_in_update = False
    gradient_scale = 1.0
    holds_master_weights = has_whole_gradients = True

    def __init__(self, ranks: Ranks, device: torch.device, dtype: torch.dtype = torch.float32, args=None):
        self.ranks, self.device, self.dtype, self.args = ranks, device, dtype, args
        self.sum_dtype = torch.float32 if device.type == "mps" else torch.float64
        self.scaler = precision.grad_scaler(device, dtype)
        self.reads_late = type(self) is Engine and device.type == "cuda" and not self.scaler.is_enabled()
        self.module: nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``batch`` on the device; to a GPU from pinned memory, so that the copy does not stop the host."""
        if self.device.type == "cuda":
            batch = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module to train: ``model`` itself, or wrapped for the ranks. Comes before the optimizer."""
        self.module = model
        if self.ranks.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
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

    def autocast(self, device: torch.device | None = None):
        """Return the context of a forward pass in the run's dtype, on ``device`` if it is not the engine's."""
        return precision.autocast(device or self.device, self.dtype)

    def set_last(self, is_last: bool) -> None:
        """Tell, before a forward pass, whether its backward ends the step: only then gradients are averaged."""
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

    def step(self, is_finite: Tensor | None = None) -> bool:
        """Apply the update and clear the gradients; return whether it was applied (float16 skips overflows).

        Args:
            is_finite: on the device, for an engine that ``reads_late``. Nobody has looked at it yet, so the fused
                optimizer does: where it is False, the update changes nothing, and the host need not wait.
        """
        if is_finite is not None:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~is_finite).float()
        scale_before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.scaler.get_scale() >= scale_before

    # ---- what a checkpoint holds ------------------------------------------------------------------------------

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
        """Continue from the weights of ``whole`` (the trained model itself, if every rank holds it) and a state."""
        self.optimizer.load_state_dict(optimizer_state)

    def scaler_state(self) -> dict:
        """Return the state of the loss's scaling; empty where it is not scaled."""
        return self.scaler.state_dict()

    def load_scaler_state(self, state: dict) -> None:
        """Continue from it. A run that resumes in another dtype starts its scaling over."""
        if "scale" in state and self.scaler.is_enabled():  # DeepSpeed's has other names
            self.scaler.load_state_dict(state)


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the buffers of ``model`` by name, as they are; tied ones once."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.state_dict().items() if name not in parameters}


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, function: Callable[[nn.Parameter], Tensor]) -> Iterator[None]:
    """Return a context in which ``module`` has ``function`` of each of its parameters, to be read."""
    owners = [owner._parameters for owner in module.modules()]
    parameters = [(owner, name, p) for owner in owners for name, p in owner.items() if p is not None]
    try:
        for owner, name, parameter in parameters:
            owner[name] = nn.Parameter(function(parameter).detach(), requires_grad=False)
        yield
    finally:
        for owner, name, parameter in parameters:
            owner[name] = parameter


def map_tensors(tree, function):
    """Return nested containers like ``tree``, with ``function`` of each tensor in its place."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree
