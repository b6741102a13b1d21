"""The arguments of ``train_reason.py``."""

import math
from dataclasses import dataclass

from minillm.cli.command_line import require
from minillm.cli.replay_arguments import ReplayArguments


@dataclass(frozen=True, kw_only=True)
class ReasonArguments(ReplayArguments):
    """Reasoning distillation: a model that answers learns to think first, from a larger model's written thoughts."""

    bare_stage = "reason"
    from_weight: str = "rlhf"
    """The model that learns to think: a stage name, a model directory or a .pth file."""
    tag_weight: float = 10.0
    """Weight of the targets <think> </think> <answer> </answer> in the loss; all others weigh 1."""

    learning_rate: float = 1e-5
    """Peak learning rate. A fifth of SFT's: the form is soon learned, and what the model knows should stay."""
    epochs: int = 1
    """Passes over the data."""
    max_seq_len: int = 1024
    """Row length T in tokens; thoughts are longer than answers."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.from_weight), "--from_weight is empty: name the model that is to learn to think")
        finite = 0 < self.tag_weight < math.inf
        require(finite, f"--tag_weight {self.tag_weight}: must be positive and finite; 1 weighs all targets alike")
