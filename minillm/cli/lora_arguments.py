"""The arguments of ``train_lora.py``, and those of every stage that can train an adapter."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from minillm.cli.arguments import TrainArguments
from minillm.cli.command_line import require
from minillm.cli.replay_arguments import ReplayArguments
from minillm.errors import UserError
from minillm.lora import LoRAConfig
from minillm.lora.more.init import Init
from minillm.precision import choose_dtype


@dataclass(frozen=True, kw_only=True)
class AdapterArguments(TrainArguments):
    """The settings of an adapter."""

    lora_name: str = ""
    """Train an adapter of this name instead of the model; it is saved in SAVE_DIR/lora/<lora_name>_<hidden_size>."""
    lora_rank: int = 8
    """Rank R: the width of the thin matrices A (R, in) and B (out, R)."""
    lora_alpha: float = 16.0
    """What the adapter adds is scaled by alpha/R (with use_rslora by alpha/sqrt(R))."""
    lora_dropout: float = 0.0
    """Probability that an input of A is set to zero in training."""
    target_modules: str = "all-linear"
    """Layers to adapt: all-linear, attention, mlp, experts, names with commas, or a regular expression."""
    lora_layers: str = ""
    """Numbers of the blocks to adapt, with commas (default: all)."""
    rank_pattern: str = ""
    """Other ranks for some layers: NAME=RANK with commas, e.g. down_proj=16."""
    alpha_pattern: str = ""
    """Other alphas for some layers: NAME=ALPHA with commas."""
    lora_bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are trained too."""
    modules_to_save: str = ""
    """Layers that are trained and saved whole, with commas, e.g. embed_tokens,lm_head."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(R), so that large ranks learn as fast as small ones."""
    use_dora: bool = False
    """DoRA: train the length of each row of the weight too."""
    lora_init: Literal[get_args(Init)] = "kaiming"
    """What A and B begin with; pissa and olora take it out of the weights."""
    loraplus_ratio: float = 1.0
    """LoRA+: learning rate of B as a multiple of that of A (its paper: 16)."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the frozen weights; the adapter is float32 in any case."""

    @cached_property
    def lora_config(self) -> LoRAConfig:
        """Return the adapter's settings; UserError for one that cannot be."""
        layers = [part.strip() for part in self.lora_layers.split(",") if part.strip()]
        whole = all(layer.isdecimal() for layer in layers)
        require(whole, f"--lora_layers {self.lora_layers}: must be numbers of blocks with commas, e.g. 0,1,2")
        modules = tuple(part.strip() for part in self.modules_to_save.split(",") if part.strip())
        return LoRAConfig(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.target_modules,
            layers=tuple(map(int, layers)) or None,
            rank_pattern=_pattern("rank_pattern", self.rank_pattern, int),
            alpha_pattern=_pattern("alpha_pattern", self.alpha_pattern, float),
            bias=self.lora_bias,
            modules_to_save=modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init=self.lora_init,
        )

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.from_weight), "--from_weight is empty: name the model that is to be tuned")
        message = f"--lora_name {self.lora_name!r}: must be a name without dots and slashes"
        require(not set(self.lora_name) & set("/\\."), message)
        require(self.loraplus_ratio > 0, f"--loraplus_ratio {self.loraplus_ratio}: must be positive")
        try:
            _ = self.lora_config
        except UserError as error:
            raise UserError(f"the adapter's settings: {error}") from None

    def choose_base_dtype(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that ``--base_dtype`` names, for a run that computes in ``dtype``.

        Raises:
            UserError: short weights next to layers trained whole, which are float32, and no autocast to join them.
        """
        base = choose_dtype(self.base_dtype, device, flag="base_dtype")
        mixed = base != dtype == torch.float32 and (self.modules_to_save or self.lora_bias != "none")
        message = "the layers that are trained whole are float32, so products need one short dtype: give --dtype auto"
        require(not mixed, f"--base_dtype {self.base_dtype} with --dtype {self.dtype}: {message}")
        return base


@dataclass(frozen=True, kw_only=True)
class LoRAArguments(AdapterArguments, ReplayArguments):
    """LoRA: a few percent of new parameters learn what is new, the model stays as it is."""

    bare_stage = "lora"
    from_weight: str = "full_sft"
    """The model that is adapted: a stage name, a model directory or a .pth file."""
    lora_name: str = "lora"
    """Name of the adapter; it is saved in SAVE_DIR/lora/<lora_name>_<hidden_size>."""
    monitor: bool = False
    """Watch the adapter's gradients and updates, warn, and draw them (monitor.jsonl, monitor.png)."""
    monitor_interval: int = 0
    """Steps between looks (0: 5 with --monitor, else none). Under torchrun, which takes --monitor for its own, give
    this alone."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        super().check()
        require(bool(self.lora_name), "--lora_name '': give the adapter a name")
        require(self.monitor_interval >= 0, f"--monitor_interval {self.monitor_interval}: must not be negative")


def _pattern(flag: str, text: str, kind: type) -> dict:
    found = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = part.rpartition("=")
        try:
            found[name] = kind(value)
        except ValueError:
            name = ""
        require(bool(name), f"--{flag} {text}: must be NAME=NUMBER with commas, e.g. down_proj=16")
    return found
