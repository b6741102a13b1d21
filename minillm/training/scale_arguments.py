"""The arguments that say how a run is spread over devices, and how it is kept."""

from dataclasses import dataclass
from typing import Literal

from minillm.training.command_line import require
from minillm.training.model_arguments import ModelArguments


@dataclass(frozen=True, kw_only=True)
class ScaleArguments(ModelArguments):
    """What every training stage shares, beside the training itself."""

    parallel: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: the whole model on every rank; fsdp: parameters, gradients and optimizer sharded (FSDP2); deepspeed:
    ZeRO."""
    deepspeed_config: str = "configs/deepspeed/zero2.json"
    """DeepSpeed's settings; every "auto" in it is filled from the flags."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others before it gives up."""

    from_resume: bool = False
    """Go on from the newest intact checkpoint of this run's directory."""
    auto_resume: bool = False
    """Go on if there is a checkpoint, else begin: for jobs that a scheduler starts again. torchrun's own restarts do so
    without it."""
    save_interval: int = 100
    """Steps between checkpoints (0: only at the end)."""
    save_minutes: float = 0.0
    """Minutes between checkpoints, beside --save_interval (0: never by time)."""
    keep_last: int = 2
    """Checkpoints kept."""
    async_save: bool = True
    """Go on training while a checkpoint is written, from a copy in the main rank's memory (12 bytes per parameter)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        for name, least in {"save_interval": 0, "save_minutes": 0, "keep_last": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        require(self.timeout_minutes > 0, f"--timeout_minutes {self.timeout_minutes}: must be more than 0")
        super().check()
