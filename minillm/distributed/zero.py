"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and parameters (3) sharded over the ranks, on the CPU if asked.

Rajbhandari et al., ZeRO (2020), section 5; Ren et al., ZeRO-Offload (2021). DeepSpeed owns accumulation, clipping and
loss scaling; what is ours is to say when a step ends, and to bring its sharded state into the form of a checkpoint that
every engine, on any number of ranks, can go on from.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.distributed.engine import MOMENTS, Engine, changing_state, replaced_parameters
from minillm.errors import UserError, missing_package


class ZeRO(Engine):
    """DeepSpeed's engine around the model and our AdamW; the stage is in the file that ``--deepspeed_config`` names."""

    needs_group = clips_in_update = True
    holds_master_weights = has_whole_gradients = False

    def __init__(self, ranks, device: torch.device, dtype: torch.dtype = torch.float32, args=None):
        super().__init__(ranks, device, dtype, args)
        self.scaler = torch.amp.GradScaler(enabled=False)  # DeepSpeed scales by itself
        self.deepspeed = _import_deepspeed(args.device)
        self.settings = read_settings(Path(args.deepspeed_config))
        self.is_sharded = self.settings.get("zero_optimization", {}).get("stage", 0) >= 3
        self._applied = False
        offloads = "offload_optimizer" in self.settings.get("zero_optimization", {})
        if offloads and getattr(args, "balance_gradients", False):
            raise UserError(
                "--balance_gradients with offload_optimizer: DeepSpeed takes the gradients' norm before they can be "
                "changed, so that clipping would be wrong; use configs/deepspeed/zero2.json"
            )

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return ``model`` as it is, for the optimizer to be made of its parameters."""
        self.module = self.model = model
        self.whole_shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return model

    def attach(self, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Hand model and optimizer to DeepSpeed; return what the loop calls."""
        self.groups = [list(group["params"]) for group in optimizer.param_groups]  # DeepSpeed puts its own there
        is_alone = not any(getattr(self.args, name, None) for name in ("reference_kind", "teacher"))
        is_whole = all(parameter.requires_grad for parameter in self.model.parameters())
        n_rows, world_size = self.args.rows_per_step(self.ranks.world_size), self.ranks.world_size
        self.settings = fill_in(
            self.settings,
            batch_size=self.args.batch_size,
            accumulation_steps=n_rows // (self.args.batch_size * world_size),
            world_size=world_size,
            grad_clip=self.args.grad_clip,
            dtype=self.dtype,
            # A frozen model next to the trained one computes by autocast, and both should do so alike.
            short_weights=is_whole and is_alone,
            hidden_size=self.model.config.hidden_size,
            on_cuda=self.device.type == "cuda",
        )
        os.environ.setdefault("LOCAL_RANK", "0")  # without a launcher
        if self.ranks.is_main:
            for lock in build_locks():
                text = f"waiting for the process that builds {lock.parent.name} for DeepSpeed, as {lock} says; if there"
                print(f"{text} is none (it was killed), remove that file", file=sys.stderr, flush=True)
        self.module, self.wrapped, _, _ = self.deepspeed.initialize(
            model=self.model, optimizer=optimizer, config=self.settings, dist_init_required=False
        )
        self.optimizer = optimizer
        self._make_moments()
        return self.module

    def autocast(self, device: torch.device | None = None):
        """Return the context of a forward pass: none for a model that DeepSpeed keeps in a short dtype."""
        is_short = any(self.settings.get(name, {}).get("enabled") is True for name in ("bf16", "fp16"))
        return contextlib.nullcontext() if is_short else super().autocast(device)

    def set_last(self, is_last: bool) -> None:
        """Say whether the next backward pass ends the step. From stage 2 on every pass reduces: that is its price."""
        self.module.set_gradient_accumulation_boundary(is_last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, which is divided by nothing more: its share of the step is in it."""
        self.module.backward(loss, scale_wrt_gas=False)

    def clip(self, max_norm: float) -> Tensor:
        """Clip and update in one: DeepSpeed knows the norm only inside its step. Returns the norm before.

        An update whose norm is not finite is left out by DeepSpeed too.
        """
        self.wrapped.clip_grad = max_norm
        loss_scale = self.loss_scale or 1.0  # the step may change it
        self.module.step()
        self._applied = self.module.was_step_applied()
        norm = self.module.get_global_grad_norm()
        too_long = (float(norm or 0.0) + 1e-6) / max_norm if max_norm else 1.0
        self.gradient_scale = 1.0 / (max(1.0, too_long) * loss_scale)
        return torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float64)

    def step(self, is_finite: Tensor | None = None) -> bool:
        """Return whether the update was applied."""
        return self._applied

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's whole gradient, before it is clipped; only between ``backward`` and ``clip``."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).view(whole_shape(parameter))

    def set_gradient(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Replace a parameter's gradient with a whole one, before it is clipped."""
        from deepspeed.utils import safe_set_full_grad

        padding = gradient.new_zeros(self.ranks.world_size)  # stage 3 cuts it into parts of the same length
        safe_set_full_grad(parameter, torch.cat([gradient.flatten(), padding]))

    def adam_state(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict:
        """Return the settings and the whole state that ``optimizer`` has for a parameter."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = zip(optimizer.param_groups, self.groups, strict=True)
        settings = next(settings for settings, parameters in groups if any(p is parameter for p in parameters))
        moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        moments = {name: moment.view(whole_shape(parameter)) for name, moment in moments.items()}
        return {**settings, "step": next(iter(optimizer.state.values()))["step"], **moments}

    @contextlib.contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Return a context in which ``module`` has its master weights and whatever is frozen whole, to be read."""
        from deepspeed.utils import safe_get_full_fp32_param

        def whole(parameter: nn.Parameter) -> Tensor:
            if not parameter.requires_grad or self.optimizer is None:  # DeepSpeed has not taken it yet
                return parameter
            return safe_get_full_fp32_param(parameter).view(whole_shape(parameter))

        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        enabled = self.is_sharded and any(hasattr(parameter, "ds_id") for parameter in frozen)
        with self.deepspeed.zero.GatheredParameters(frozen, enabled=enabled), replaced_parameters(module, whole):
            yield

    @property
    def loss_scale(self) -> float | None:
        """The factor of the loss under float16; None where it is not scaled."""
        return float(self.wrapped.cur_scale) if self.settings["fp16"]["enabled"] is True else None

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Gather the master weights one by one; only the main rank keeps them, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param

        state = {}
        for name, tensor in changing_state(self.model).items():
            if name in self.whole_shapes:
                tensor = safe_get_full_fp32_param(self.model.get_parameter(name))
            if self.ranks.is_main:
                state[name] = tensor.detach().to("cpu", copy=True).view(self.whole_shapes.get(name, tensor.shape))
        return state if self.ranks.is_main else None

    def optimizer_state(self) -> dict | None:
        """Gather AdamW's moments one by one, in the form of torch's ``state_dict``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        names = self._names()
        n_steps = next(iter(self.optimizer.state.values()))["step"]
        state, groups, index = {}, [], 0
        for settings, parameters in zip(self.optimizer.param_groups, self.groups, strict=True):
            groups.append({key: value for key, value in settings.items() if key != "params"})
            groups[-1]["params"] = list(range(index, index + len(parameters)))
            for parameter in parameters:
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                if self.ranks.is_main:
                    shape = self.whole_shapes[names[index]]
                    moments = {name: tensor.to("cpu", copy=True).view(shape) for name, tensor in moments.items()}
                    state[index] = {"step": torch.as_tensor(n_steps).to("cpu", copy=True), **moments}
                index += 1
        return {"state": state, "param_groups": groups} if self.ranks.is_main else None

    def load(self, whole: nn.Module, optimizer_state: dict) -> None:
        """Deal the weights of ``whole`` and AdamW's whole state out to the ranks."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        tensors = changing_state(whole)
        n_steps = next(iter(optimizer_state["state"].values()))["step"]
        for values in self.optimizer.state.values():
            values["step"].fill_(float(n_steps))
        trained = [parameter for group in self.groups for parameter in group]
        names = self._names()
        for index, parameter in enumerate(trained):
            value = tensors[names[index]].to(self.device)
            gathered = self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.is_sharded)
            with gathered, torch.no_grad():
                parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value)
            for name in MOMENTS:
                moment = optimizer_state["state"][index][name].to(self.device)
                safe_set_full_optimizer_state(parameter, moment, name)
        for name, buffer in self.model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])

    def shapes(self) -> list[torch.Size]:
        """Return the whole shapes of the optimizer's parameters, in its order."""
        return [self.whole_shapes[name] for name in self._names()]

    def scaler_state(self) -> dict:
        """Return the numbers of DeepSpeed's loss scaler; empty where the loss is not scaled."""
        if self.loss_scale is None:
            return {}
        return {key: value for key, value in vars(self.wrapped.loss_scaler).items() if isinstance(value, int | float)}

    def load_scaler_state(self, state: dict) -> None:
        """Go on from them."""
        if self.loss_scale is not None and "cur_scale" in state:
            vars(self.wrapped.loss_scaler).update(state)

    def _names(self) -> list[str]:
        """Return the names of the optimizer's parameters, in its order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in self.groups for parameter in group]

    def _make_moments(self) -> None:
        """Make AdamW's state now, which it would make itself in its first step.

        DeepSpeed looks for it once, after the first group's first step, and would not find that of the other groups.
        """
        flat = getattr(self.wrapped, "fp32_partitioned_groups_flat", None)  # stage 3
        if flat is None:
            flat = self.wrapped.single_partition_of_fp32_groups
        for partition in flat:
            moments = {name: torch.zeros_like(partition, requires_grad=False) for name in MOMENTS}
            self.optimizer.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
        if hasattr(self.wrapped, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2 link them once
            self.wrapped._lazy_init_hp_params_optimizer_state()


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, of which stage 3 leaves nothing in the parameter itself."""
    return getattr(parameter, "ds_shape", parameter.shape)


def build_locks() -> list[Path]:
    """Return the lock files of DeepSpeed's extensions: a build that was killed leaves its own, and all others wait."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return sorted(root.glob("*/lock")) + sorted(root.glob("*/*/lock"))


def read_settings(path: Path) -> dict:
    """Return the contents of a DeepSpeed configuration.

    Raises:
        UserError: it is not there or no JSON object.
    """
    in_repository = Path(__file__).parents[2] / path  # a command given in another directory than the library's
    try:
        settings = json.loads((path if path.exists() else in_repository).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--deepspeed_config {path}: no such file; configs/deepspeed/ has one for each stage") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed_config {path}: not readable as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UserError(f"--deepspeed_config {path}: expected a JSON object, found {type(settings).__name__}")
    if "optimizer" in settings or "scheduler" in settings:
        raise UserError(f"--deepspeed_config {path}: leave out optimizer and scheduler, the flags rule them")
    return settings


def fill_in(
    settings: dict,
    *,
    batch_size: int,
    accumulation_steps: int,
    world_size: int,
    grad_clip: float,
    dtype: torch.dtype,
    short_weights: bool,
    hidden_size: int,
    on_cuda: bool,
) -> dict:
    """Return ``settings`` with every "auto" replaced by what follows from the flags, the model and the device.

    Args:
        short_weights: let DeepSpeed keep the model itself in bfloat16 next to its float32 master weights; else, as with
            an adapter, which stays float32, products alone are short (``torch_autocast``).

    Raises:
        UserError: an "auto" that has no rule, or a batch size that contradicts the flags.
    """
    is_bf16 = dtype == torch.bfloat16
    values = {
        "train_batch_size": batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": grad_clip,
        "bf16.enabled": is_bf16 and short_weights,
        "fp16.enabled": dtype == torch.float16,
        "torch_autocast.enabled": is_bf16 and not short_weights,
        "torch_autocast.dtype": str(dtype).removeprefix("torch."),
        "zero_optimization.reduce_bucket_size": bucket_size(hidden_size),
        "zero_optimization.stage3_prefetch_bucket_size": bucket_size(hidden_size),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden_size,  # norms are not worth gathering
        "zero_optimization.stage3_max_live_parameters": live_parameters(hidden_size),
        "zero_optimization.stage3_max_reuse_distance": live_parameters(hidden_size),
        "zero_optimization.offload_optimizer.pin_memory": on_cuda,
        "zero_optimization.offload_param.pin_memory": on_cuda,
    }
    settings = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}} | settings
    settings.setdefault("torch_autocast", {"enabled": "auto", "dtype": "auto", "lower_precision_safe_modules": []})

    def fill(tree: dict, where: str) -> dict:
        filled = {}
        for key, value in tree.items():
            name = f"{where}{key}"
            if isinstance(value, dict):
                value = fill(value, f"{name}.")
            elif value == "auto":
                if name not in values:
                    known = ", ".join(values)
                    raise UserError(f"--deepspeed_config: {name} is auto, for which there is no rule; known: {known}")
                value = values[name]
            filled[key] = value
        return filled

    filled = fill(settings, "")
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if filled.setdefault(name, values[name]) != values[name]:
            raise UserError(
                f"--deepspeed_config: {name} is {filled[name]}, the flags make it {values[name]}: write auto there"
            )
    if not filled["torch_autocast"]["enabled"]:
        del filled["torch_autocast"]
    return filled


def bucket_size(hidden_size: int) -> int:
    """Return how many numbers are reduced at a time: one matrix, as is usual."""
    return max(hidden_size * hidden_size, 1 << 20)


def live_parameters(hidden_size: int) -> int:
    """Return how many numbers of stage 3's parameters are gathered at a time: about two blocks.

    DeepSpeed's own limit, 1e9, never drops what it has gathered of a model of less.
    """
    return max(32 * hidden_size * hidden_size, 1 << 20)


def _import_deepspeed(device: str):
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    try:
        import deepspeed
    except ImportError:
        raise missing_package("deepspeed", purpose="--parallel deepspeed", extra="deepspeed") from None
    deepspeed.utils.logger.setLevel("WARNING")
    return deepspeed
