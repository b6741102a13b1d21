"""The arguments of ``train_distill.py``."""

from dataclasses import dataclass
from typing import Literal

from minillm.cli.arguments import TrainArguments
from minillm.cli.command_line import require
from minillm.losses.distill import DIVERGENCES


@dataclass(frozen=True, kw_only=True)
class DistillArguments(TrainArguments):
    """White-box distillation: a student learns a teacher's whole distribution over the next token."""

    bare_stage = "distill"
    teacher: str
    """The teacher: a model directory, a stage name of SAVE_DIR with its width (full_sft_768), or a .pth file. It may
    have another size or experts, but the student's tokenizer."""
    from_weight: str = ""
    """Weights that the student begins with: a stage name, a model directory or a .pth file (default: new ones)."""
    alpha: float = 0.5
    """Weight of the cross-entropy with the data; 1 - alpha is that of the divergence from the teacher."""
    temperature: float = 1.0
    """Both distributions are softened by it; the divergence is multiplied by its square."""
    divergence: Literal[DIVERGENCES] = "forward"
    """forward KL(teacher || student) covers all that the teacher does, reverse keeps to what it does most, symmetric is
    their mean, js the Jensen-Shannon divergence."""
    top_k: int = 0
    """Keep the teacher's k best tokens of every position on disk, computed once, instead of the teacher in memory
    (0: the teacher is asked in every step)."""
    teacher_cache: str = ""
    """With top_k: the folder for them (default: SAVE_DIR/.teacher_cache)."""
    max_cache_gib: float = 20.0
    """With top_k: refuse a larger cache."""
    hidden_weight: float = 0.0
    """Weight of the distance between the student's last hidden states, through a learnt projection, and the teacher's,
    both at length 1 (0: none)."""
    on_policy: float = 0.0
    """Share of the steps in which the student's own answers to the prompts are what the teacher judges (GKD)."""
    max_new_tokens: int = 128
    """With on_policy: longest answer."""
    sampling_temperature: float = 1.0
    """With on_policy: temperature of the answers."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several texts or conversations per row, which never see each other; none: one per row."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or ones that do not go together."""
        super().check()
        for name, low, high in (("alpha", 0, 1), ("on_policy", 0, 1)):
            value = getattr(self, name)
            require(low <= value <= high, f"--{name} {value}: must lie between {low} and {high}")
        for name in ("temperature", "sampling_temperature", "max_cache_gib"):
            require(getattr(self, name) > 0, f"--{name} {getattr(self, name)}: must be positive")
        for name in ("top_k", "hidden_weight"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        require(self.max_new_tokens >= 1, f"--max_new_tokens {self.max_new_tokens}: must be at least 1")
        live = not self.top_k
        require(live or not self.on_policy, f"--top_k {self.top_k}: is of the data, --on_policy needs the teacher")
        require(live or not self.hidden_weight, f"--top_k {self.top_k}: keeps no hidden states for --hidden_weight")
        require(not live or not self.teacher_cache, f"--teacher_cache {self.teacher_cache}: goes with --top_k")
