"""The shape of a model on the command line, for training, planning and ``eval_model.py``."""

from dataclasses import dataclass
from typing import Literal

from minillm.cli.command_line import require
from minillm.config import PRESETS

# The flags of a mixture of experts, with the names of the configuration (``shared_expert_gate`` is a switch besides).
EXPERT_FLAGS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "scoring_func",
    "first_k_dense_replace", "norm_topk_prob",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """The shape of a new model; with ``--from_weight`` the shape comes from the weights instead."""

    preset: Literal["small", "base", "moe", "demo"] = "small"
    """small 512x8 (26M), base 768x16 (104M), moe 640x8 with experts (145M), demo 128x4 (two CPU cores)."""
    hidden_size: int | None = None
    """Width D of the residual stream (default: the preset's)."""
    num_hidden_layers: int | None = None
    """Number of blocks (default: the preset's)."""
    num_attention_heads: int | None = None
    """Number of query heads H (default: the preset's)."""
    num_key_value_heads: int | None = None
    """Number of key and value heads G (default: the preset's)."""
    intermediate_size: int | None = None
    """Feed-forward width F (default: 64*ceil(8D/3/64))."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix also as the output layer."""
    use_qk_norm: bool = False
    """Normalise queries and keys per head (the Qwen3 family)."""
    rope_theta: float | None = None
    """Base of the rotary angles (default: 1e6); a .pth with LLaMA's own parameter names needs it."""
    use_moe: bool = False
    """Mixture of experts: 4 experts, 2 per token, and 1 shared by all tokens; the next flags change this."""
    num_experts: int | None = None
    """Experts E from which the router of a block chooses (default: 4)."""
    num_experts_per_tok: int | None = None
    """Experts per token (default: 2)."""
    moe_intermediate_size: int | None = None
    """Width F of one expert (default: that of the dense layer)."""
    n_shared_experts: int | None = None
    """Experts that every token goes through as well (default: 1 with sigmoid scores, 0 with softmax)."""
    shared_expert_gate: bool = False
    """With softmax scores: multiply what the shared experts give by a trained gate, as Qwen1.5-MoE does."""
    scoring_func: Literal["softmax", "sigmoid"] | None = None
    """sigmoid: GLM-4.5, balanced by a bias; softmax: Qwen2-MoE with shared experts, Qwen3-MoE with use_qk_norm, else
    Mixtral (default: sigmoid)."""
    first_k_dense_replace: int | None = None
    """First blocks, which have a dense layer instead of experts (default: 0)."""
    norm_topk_prob: bool | None = None
    """Divide the weights of a token's experts by their sum (default: true)."""
    rope_scaling: str = ""
    """Use more positions than in training: TYPE:FACTOR with linear, dynamic or yarn, e.g. yarn:4 for 4 times as many;
    none: ignore the weights' setting (default: the weights' setting)."""
    rope_original_len: int = 0
    """With rope_scaling: longest row in tokens of the earlier training (0: the model's positions without scaling)."""

    @property
    def rope_type_and_factor(self) -> tuple[str, float] | None:
        """The type and factor of ``--rope_scaling``; ``("default", 1.0)`` for "none"; None if it was not given.

        Raises:
            UserError: it is not TYPE:FACTOR, or --rope_original_len is given without it.
        """
        require(self.rope_original_len >= 0, f"--rope_original_len {self.rope_original_len}: must be at least 0")
        is_scaled = self.rope_scaling not in ("", "none")
        message = f"--rope_original_len {self.rope_original_len}: goes with a --rope_scaling such as yarn:4, add one"
        require(is_scaled or not self.rope_original_len, message)
        if not is_scaled:
            return ("default", 1.0) if self.rope_scaling else None
        rope_type, _, factor = self.rope_scaling.partition(":")
        usage = f"--rope_scaling {self.rope_scaling}: must be none or TYPE:FACTOR, TYPE"
        require(rope_type in ("linear", "dynamic", "yarn"), f"{usage} one of linear, dynamic, yarn (e.g. yarn:4)")
        try:
            value = float(factor)
        except ValueError:
            value = 0.0
        require(1 <= value <= 1e9, f"{usage} followed by a number of at least 1 (e.g. {rope_type}:4)")
        return rope_type, value

    @property
    def has_experts(self) -> bool:
        """Whether the model is a mixture of experts."""
        return self.use_moe or self.preset == "moe"

    def model_overrides(self) -> dict:
        """Return the configuration keys that the command line sets."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                 "rope_theta")  # fmt: skip
        given = {name: getattr(self, name) for name in (*names, *EXPERT_FLAGS) if getattr(self, name) is not None}
        if self.shared_expert_gate:
            given["shared_expert_gate"] = True
        return given | {"tie_word_embeddings": self.tie_word_embeddings, "use_qk_norm": self.use_qk_norm}

    def expert_defaults(self) -> dict:
        """Return the configuration keys that ``--use_moe`` sets: the experts of the preset ``moe``."""
        if not self.has_experts:
            return {}
        experts = {name: PRESETS["moe"][name] for name in EXPERT_FLAGS if name in PRESETS["moe"]}
        return experts | ({"n_shared_experts": 0} if self.scoring_func == "softmax" else {})

    def check(self) -> None:
        """Raise ``UserError`` for an invalid --rope_scaling, and for expert flags without --use_moe or out of range."""
        _ = self.rope_type_and_factor  # raises the error
        given = [name for name in EXPERT_FLAGS if getattr(self, name) is not None]
        require(self.rope_theta is None or self.rope_theta > 0, f"--rope_theta {self.rope_theta}: must be positive")
        for name in given + (["shared_expert_gate"] if self.shared_expert_gate else []):
            value = getattr(self, name)
            require(self.has_experts, f"--{name} {value}: goes with --use_moe (a mixture of experts), add it")
            least = 1 if name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size") else 0
            require(name == "scoring_func" or value >= least, f"--{name} {value}: must be at least {least}")
