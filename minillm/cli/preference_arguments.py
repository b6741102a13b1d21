"""The arguments of ``train_dpo.py``."""

from dataclasses import dataclass
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.lora_arguments import AdapterArguments
from minillm.lora.more.init import RESIDUAL_INITS
from minillm.losses.preference import LOSS_TYPES, NEEDS_REFERENCE, SMOOTHED


@dataclass(frozen=True, kw_only=True)
class PreferenceArguments(AdapterArguments):
    """Preference tuning: the model learns which of two replies people prefer."""

    bare_stage = "dpo"
    from_weight: str = "full_sft"
    """The model that is tuned, and its own reference: a stage name, a model directory or a .pth file."""
    loss_type: Literal[(*LOSS_TYPES, "kto")] = "sigmoid"
    """sigmoid (DPO; with label_smoothing cDPO), robust, ipo, hinge, simpo and orpo (without a reference), kto (judged
    replies: prompt, completion, label; pairs count as a good and a bad one)."""
    beta: float = 0.1
    """Strength of the KL penalty: rewards are beta times log-ratios (simpo: 2.0 and more; orpo: the weight
    of its odds ratio)."""
    label_smoothing: float = 0.0
    """sigmoid, robust, simpo: the share of pairs that are labelled the wrong way round, below 0.5."""
    gamma: float = 0.0
    """simpo: the margin that is asked for between the rewards."""
    sft_weight: float = 0.0
    """Weight of the chosen replies' own mean loss per token, added to the loss."""
    desirable_weight: float = 1.0
    """kto: weight of good replies."""
    undesirable_weight: float = 1.0
    """kto: weight of bad replies."""
    reference: Literal["auto", "copy", "adapter", "cached"] = "auto"
    """copy: a frozen copy of the model; adapter: the model with its adapter off; cached: log-probabilities computed
    beforehand and kept on disk; auto: adapter with --lora_name, else copy."""
    reference_cache: str = ""
    """With cached: the folder for them (default: SAVE_DIR/.reference_cache)."""
    packing: Literal["best_fit", "none"] = "best_fit"
    """best_fit: several pairs per row, which never see each other; none: one per row, sorted by length."""
    max_seq_len: int = 512
    """Longest conversation in tokens, with one reply; a row holds two, or more shorter ones."""
    learning_rate: float = 5e-6
    """Peak learning rate; far below that of fine-tuning, or old skills go (with an adapter ten times as much)."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""

    @property
    def reference_kind(self) -> str | None:
        """Return how the reference is computed; None for a loss without one."""
        if self.loss_type not in NEEDS_REFERENCE:
            return None
        return self.reference if self.reference != "auto" else "adapter" if self.lora_name else "copy"

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range, or one that the loss has no use for."""
        super().check()
        require(self.beta > 0, f"--beta {self.beta}: must be positive")
        require(0 <= self.label_smoothing < 0.5, f"--label_smoothing {self.label_smoothing}: must be 0 to below 0.5")
        smoothed = self.loss_type in SMOOTHED or not self.label_smoothing
        require(smoothed, f"--label_smoothing {self.label_smoothing}: goes with {', '.join(SMOOTHED)}")
        require(self.gamma >= 0, f"--gamma {self.gamma}: must not be negative")
        require(self.loss_type == "simpo" or not self.gamma, f"--gamma {self.gamma}: goes with --loss_type simpo")
        for name in ("sft_weight", "desirable_weight", "undesirable_weight"):
            require(getattr(self, name) >= 0, f"--{name} {getattr(self, name)}: must not be negative")
        weighted = (self.desirable_weight, self.undesirable_weight) != (1, 1)
        require(self.loss_type == "kto" or not weighted, "--desirable_weight, --undesirable_weight: go with kto")
        require(self.loss_type != "kto" or not self.sft_weight, "--sft_weight: goes with pairs, not with kto")
        known = ", ".join(sorted(NEEDS_REFERENCE))
        message = f"--reference {self.reference}: --loss_type {self.loss_type} has none; those with one: {known}"
        require(self.reference == "auto" or self.loss_type in NEEDS_REFERENCE, message)
        require(self.reference != "adapter" or bool(self.lora_name), "--reference adapter: goes with --lora_name")
        # With B = 0 dropout changes nothing at first; an adapter made of the weights themselves it does change.
        starts_at_reference = not (self.lora_name and self.lora_dropout and self.lora_init in RESIDUAL_INITS)
        require(
            starts_at_reference or self.loss_type not in NEEDS_REFERENCE,
            f"--lora_dropout {self.lora_dropout} with --lora_init {self.lora_init}: dropout would take from what the "
            f"model can already do, so that it would not start at its reference; use --lora_dropout 0, or another "
            f"--lora_init",
        )
        cached = self.reference == "cached" or not self.reference_cache
        require(cached, f"--reference_cache {self.reference_cache}: goes with --reference cached")
