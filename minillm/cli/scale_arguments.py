"""The arguments that say how a run is spread over devices, and how it is kept."""

from dataclasses import dataclass
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.model_arguments import ModelArguments

RESERVED_NAMES = ("lora", "tokenizer", "checkpoints", "best", "demo")  # of SAVE_DIR and of a run's directory
MAX_NAME_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class ScaleArguments(ModelArguments):
    """What every training stage shares, besides the training itself."""

    parallel: Literal["ddp", "fsdp", "deepspeed"] = "ddp"
    """ddp: the whole model on every rank; fsdp: parameters, gradients and optimizer sharded (FSDP2); deepspeed:
    ZeRO."""
    deepspeed_config: str = "configs/deepspeed/zero2.json"
    """DeepSpeed's settings; every "auto" in it is filled from the flags."""
    timeout_minutes: float = 30.0
    """How long a rank waits for the others before it gives up."""

    run_name: str = ""
    """Name of the run directory under SAVE_DIR (default: <stage>_<hidden_size>)."""
    overwrite: bool = False
    """Start over in a directory that holds a run already; that run is moved to a folder earlier-1 inside it."""
    from_resume: bool = False
    """Go on from the newest intact checkpoint of this run's directory."""
    auto_resume: bool = False
    """Go on if there is a checkpoint, else begin: for jobs that a scheduler starts again. torchrun's own restarts do so
    without it."""
    extend: bool = False
    """Make a resumed run longer than it was meant to be (more --epochs or --max_steps). Only the schedules constant and
    wsd allow it, the latter before its decay begins."""
    save_interval: int = 0
    """Steps between checkpoints, in addition to --save_minutes (0: not by steps). The end of a run is always saved."""
    save_minutes: float = 10.0
    """Minutes between checkpoints (0: not by time)."""
    keep_last: int = 2
    """Checkpoints kept."""
    async_save: bool = True
    """Go on training while a checkpoint is written, from a copy in the main rank's memory (12 bytes per parameter)."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        for name, least in {"save_interval": 0, "save_minutes": 0, "keep_last": 1}.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        is_plain = self.run_name not in (".", "..") and not set(self.run_name) & set('/\\:*?"<>|')
        is_plain = is_plain and self.run_name.isprintable() and len(self.run_name.encode()) <= MAX_NAME_BYTES
        message = f"a plain name of at most {MAX_NAME_BYTES} bytes, without slashes and the like"
        require(is_plain or not self.run_name, f"--run_name {self.run_name[:300]!r}: must be {message}")
        is_free = self.run_name not in RESERVED_NAMES and not self.run_name.startswith(".")
        require(is_free, f"--run_name {self.run_name}: that directory has another use; choose another name")
        resumes = self.from_resume or self.auto_resume
        require(not (self.extend and not resumes), "--extend: needs --from_resume, whose run it makes longer")
        require(not (self.overwrite and self.from_resume), "--overwrite starts over, --from_resume resumes: choose one")
        require(self.timeout_minutes > 0, f"--timeout_minutes {self.timeout_minutes}: must be more than 0")
        super().check()
