"""The arguments of the planner."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from minillm.cli.command_line import require
from minillm.cli.model_arguments import ModelArguments
from minillm.config import ModelConfig
from minillm.hub.names import find_weights
from minillm.hub.weights import preset_config, scale_positions
from minillm.plan.gpus import find_gpu, known_gpus


@dataclass(frozen=True, kw_only=True)
class PlanArguments(ModelArguments):
    """Estimate memory, time and compute of a training run before it starts."""

    from_weight: str = ""
    """Plan for the model in this directory (config.json) instead of a new one; names as in training."""
    save_dir: str = "out"
    """Directory that holds the run directories."""
    vocab_size: int = 6400
    """Tokens V of the tokenizer."""
    max_seq_len: int = 512
    """Row length T in tokens."""
    batch_size: int = 8
    """Rows per micro-batch and rank."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer update and rank."""
    global_batch_size: int = 0
    """Rows per optimizer update over all ranks (0: batch_size x accumulation_steps x ranks)."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of matrix products; weights stay float32. auto: bfloat16, or float16 on GPUs without fast bfloat16."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass. The memory table always shows both."""
    lora_rank: int = 0
    """Train an adapter of this rank on all linear layers and freeze the rest (0: train everything)."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """With lora_rank: dtype of the frozen weights."""
    ranks: int = 1
    """GPUs, one rank on each."""
    async_save: bool = True
    """Continue training while a checkpoint is written, from a copy in the main rank's host memory."""
    tokens: float = 0
    """Tokens to train on (0: 20 per parameter, after Hoffmann et al., 2022)."""
    mfu: float = 0.35
    """Assumed share of the GPU's peak that the model's operations reach; runs print the measured share."""
    gpus: str = "all"
    """Comma list of GPUs: T4, V100-16, V100-32, 3090, 4090, A10, L4, A100-40, L40S, A100-80, H100, H200."""
    json: bool = False
    """Print the figures as JSON."""

    @cached_property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        config = preset_config(self, vocab_size=self.vocab_size)
        if self.from_weight:
            path = find_weights(
                self.from_weight,
                save_dir=self.save_dir,
                hidden_size=config.hidden_size,
                has_experts=self.has_experts,
                any_width=self.hidden_size is None,
            )
            config = ModelConfig.from_hf(path)
        return scale_positions(config, self)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per update and rank."""
        if not self.global_batch_size:
            return self.accumulation_steps
        return self.global_batch_size // (self.batch_size * self.ranks)

    @property
    def gpu_names(self) -> list[str]:
        """The GPUs asked for."""
        return known_gpus() if self.gpus == "all" else [name.strip() for name in self.gpus.split(",")]

    def check(self) -> None:
        """Raise ``UserError`` for the first value out of range."""
        at_least = {"vocab_size": 1, "max_seq_len": 1, "batch_size": 1, "accumulation_steps": 1, "ranks": 1,
                    "global_batch_size": 0, "lora_rank": 0, "tokens": 0}  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            require(value >= least, f"--{name} {value}: must be at least {least}")
        require(math.isfinite(self.tokens), f"--tokens {self.tokens}: must be a finite number")
        require(0 < self.mfu <= 1, f"--mfu {self.mfu}: must be above 0 and at most 1")
        per_step = self.batch_size * self.ranks
        message = f"--global_batch_size {self.global_batch_size}: must be a multiple of batch_size x ranks = {per_step}"
        require(self.global_batch_size % per_step == 0, message)
        message = f"--base_dtype {self.base_dtype}: goes with --lora_rank, since trained weights are float32"
        require(self.base_dtype == "float32" or self.lora_rank > 0, message)
        for name in self.gpu_names:
            find_gpu(name)
        super().check()
        longest = self.config.max_position_embeddings
        require(self.max_seq_len <= longest, f"--max_seq_len {self.max_seq_len}: the model has {longest} positions")
