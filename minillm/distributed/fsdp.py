"""FSDP2: parameters, gradients and optimizer state sharded over the ranks, gathered block by block.

Zhao et al., PyTorch FSDP (2023); ``torch.distributed.fsdp.fully_shard``, which keeps each parameter as a DTensor of its
own, so that names, frozen parameters and the optimizer stay what they are without it. A checkpoint is written by all
ranks together, each its own part (``torch.distributed.checkpoint``), and read by any number of ranks.
"""

import datetime
import warnings
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minillm.distributed.engine import MOMENTS, Engine, changing_state, map_tensors, replaced_parameters


class FSDP(Engine):
    """Each block's weights are gathered before it computes and dropped after it; gradients are reduced to shards."""

    is_sharded = needs_group = places_model = True
    holds_master_weights = has_whole_gradients = False

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shard ``model`` in place, each block as it comes to the device, and return it."""
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.ranks.world_size,))
        settings = {"mesh": mesh, "mp_policy": self._precision(model)}
        for block in model.model.layers:
            fully_shard(block, **settings)
        self.module = fully_shard(model, **settings)
        if self.device.type == "cpu":  # gloo of older versions (torch 2.8) sums where FSDP asks for the mean
            for module in self.module.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # then FSDP divides by itself
        timeout = datetime.timedelta(minutes=getattr(self.args, "timeout_minutes", 30))
        self._group = dist.new_group(backend="gloo", timeout=timeout)  # of checkpoints, written in the background
        return self.module

    def set_last(self, is_last: bool) -> None:
        """Reduce gradients in the step's last backward pass only."""
        self.module.set_requires_gradient_sync(is_last)

    def clip(self, max_norm: float) -> Tensor:
        """Unscale, then clip the gradients to a global norm of ``max_norm`` (0: do not); return the norm before."""
        norm = whole(super().clip(max_norm))
        if self.scaler.is_enabled():  # an overflow in one rank's shard must skip the step on all of them
            for found in self.scaler._per_optimizer_states[id(self.optimizer)]["found_inf_per_device"].values():
                dist.all_reduce(whole(found), op=dist.ReduceOp.MAX)
        return norm

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's whole gradient; None: it has none."""
        return None if parameter.grad is None else whole(parameter.grad)

    def set_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Replace a parameter's gradient with a whole one."""
        parameter.grad.copy_(_like(parameter.grad, gradient))

    def adam_state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict:
        """Return the settings and the whole state that ``optimizer`` has for a parameter."""
        groups = (group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        return {**next(groups, {}), **map_tensors(optimizer.state.get(parameter, {}), whole)}

    def gathered(self, module: nn.Module):
        """Return a context in which the parameters of ``module`` are whole, to be read."""
        return replaced_parameters(module, whole)

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Gather the weights one by one; only the main rank keeps them, on the CPU."""
        self._reshard()
        return self._gathered(changing_state(model))

    def optimizer_state(self) -> dict | None:
        """Gather the optimizer's state one by one; only the main rank keeps it, on the CPU."""
        return self._gathered(self.optimizer.state_dict())

    def load(self, whole: nn.Module, optimizer_state: dict) -> None:
        """Deal the weights of ``whole`` and an optimizer's whole state out to the ranks."""
        self._reshard()
        tensors = changing_state(whole)
        with torch.no_grad():
            for name, tensor in changing_state(self.module).items():
                tensor.copy_(_like(tensor, tensors[name]))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: {name: _like(parameters[index], tensor) for name, tensor in values.items()}
            for index, values in optimizer_state["state"].items()
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": optimizer_state["param_groups"]})

    def save_shards(self, path: Path) -> Future:
        """Begin to write this rank's part of weights and optimizer under ``path``; all ranks call it together.

        Returns when the numbers are copied, so that training can go on; the result is there when all is written.
        """
        self._reshard()
        state = {"model": changing_state(self.module), "optimizer": self.optimizer.state_dict()["state"]}
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
        return _Shards(dcp.async_save(state, storage_writer=writer, process_group=self._group))

    def load_shards(self, path: Path, param_groups: list[dict]) -> None:
        """Read this rank's part of weights and optimizer, whatever number of ranks has written them."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = empty_state(self.module, parameters)
        dcp.load(state, checkpoint_id=path, process_group=self._group)
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": param_groups})

    def _reshard(self) -> None:
        """Drop what a forward pass without a backward pass, as in validation, has left gathered."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _precision(self, model: nn.Module) -> MixedPrecisionPolicy:
        """Gather weights in the dtype of the forward pass, reduce gradients in float32.

        An adapter is float32 whatever the model is, and a group has one dtype: then nothing is cast on the way.
        """
        has_one_dtype = len({p.dtype for p in model.parameters()}) == 1
        is_whole = all(p.requires_grad for p in model.parameters())
        if self.dtype in (torch.float32, torch.float64) or not (has_one_dtype and is_whole):
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)

    def _gathered(self, tree):
        def gather(tensor: Tensor) -> Tensor | None:
            tensor = whole(tensor)
            return tensor.detach().to("cpu", copy=True) if self.ranks.is_main else None

        gathered = map_tensors(tree, gather)
        return gathered if self.ranks.is_main else None


class _Shards(Future):
    """The writing of the shards; what went wrong in a rank is told as it was, not wrapped once per rank."""

    def __init__(self, writing: Future):
        super().__init__()
        writing.add_done_callback(self._end)

    def _end(self, writing: Future) -> None:
        error = writing.exception()
        if isinstance(error, dcp.api.CheckpointException):
            error = next(iter(error.failures.values()))[0]  # (error, its traceback) by rank
        self.set_result(None) if error is None else self.set_exception(error)


def empty_state(model: nn.Module, parameters: list[Tensor]) -> dict:
    """Return what ``save_shards`` writes: the tensors of ``model`` in place, and zeros like AdamW's ``parameters``."""
    state = {
        index: {"step": torch.zeros(()), **{name: _zeros_like(p) for name in MOMENTS}}
        for index, p in enumerate(parameters)
    }
    return {"model": changing_state(model), "optimizer": state}


def read_shards(path: Path, model: nn.Module, shapes: list[torch.Size], param_groups: list[dict]) -> dict:
    """Read sharded weights into ``model``, which is whole; return the optimizer's whole ``state_dict``.

    Args:
        shapes: of the optimizer's parameters, in its order.
    """
    state = empty_state(model, [torch.empty(shape, device="meta") for shape in shapes])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    return {"state": state["optimizer"], "param_groups": param_groups}


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that may be sharded; all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(target: Tensor, tensor: Tensor) -> Tensor:
    """Return this rank's part of ``tensor`` where ``target`` is sharded and of its shape."""
    if isinstance(target, DTensor) and tensor.shape == target.shape:
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor


def _zeros_like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape) if tensor.is_meta else torch.zeros_like(tensor, dtype=torch.float32)
