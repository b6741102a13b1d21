"""What an adapter is: its rank, its layers, its variant; and the same as peft's ``adapter_config.json``."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minillm.errors import UserError
from minillm.lora.init import TAKEN_OUT, Init

# Names of layers that a word stands for.
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "experts": ("experts.gate_up", "experts.down"),
}
EXPERT_PRODUCTS = ("gate_up", "down")  # of the fused parameters gate_up_proj and down_proj, in their order
ALL_LINEAR = "all-linear"
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")  # the number of a layer's block in its name
_NAMES = re.compile(r"[\w.,\s-]+")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The settings of one adapter. Ranks and alphas may differ by layer; everything else holds for all of it."""

    rank: int = 8
    """R, the width of the thin matrices."""
    alpha: float = 16.0
    """The product is scaled by alpha/rank, or by alpha/sqrt(rank) with use_rslora."""
    dropout: float = 0.0
    """Probability that an input of A is set to zero in training."""
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """all-linear (all but the output layer), attention, mlp, experts, names with commas, or a regular expression that
    the whole name must match."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks to adapt; None: all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of some layers, by the end of their name (a regular expression), e.g. {"layers.0.mlp.down_proj": 32}."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of some layers, likewise."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are trained too."""
    modules_to_save: tuple[str, ...] = ()
    """Layers trained and saved whole, by the end of their name, e.g. embed_tokens, lm_head. They are float32 in a
    model of half precision, which then computes under autocast only."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(rank): large ranks then learn as fast as small ones."""
    use_dora: bool = False
    """Train the length of every row of the weight too."""
    init: Init = "kaiming"
    """What A and B begin with."""

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank} | {f"rank_pattern {key!r}": value for key, value in self.rank_pattern.items()}
        for name, value in ranks.items():
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        alphas = {"alpha": self.alpha} | {f"alpha_pattern {key!r}": value for key, value in self.alpha_pattern.items()}
        for name, value in alphas.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
                raise UserError(f"{name} is {value!r}: give a number above 0")
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.target_modules, str) and self.target_names is None:
            expressions.append(self.target_modules)
        for text in expressions:
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(f"{text!r} is not a regular expression: {error}; e.g. .*q_proj") from None
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout!r}: give a number from 0 to below 1")
        if isinstance(self.modules_to_save, str) or not all(isinstance(name, str) for name in self.modules_to_save):
            raise UserError(f"modules_to_save is {self.modules_to_save!r}: give names as a tuple, e.g. ('lm_head',)")
        if not self.target_modules or not all(isinstance(name, str) for name in self.target_modules):
            raise UserError(f"target_modules is {self.target_modules!r}: give {ALL_LINEAR}, or names of layers")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"bias is {self.bias!r}: choose none, all or lora_only")
        if self.use_dora and self.init in TAKEN_OUT:
            raise UserError(f"use_dora does not go with init {self.init!r}: choose kaiming, gaussian or orthogonal")

    def rank_of(self, name: str) -> int:
        """Return the rank of the layer ``name``."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        """Return s of the layer ``name``."""
        rank = self.rank_of(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (rank**0.5 if self.use_rslora else rank)

    def is_target(self, name: str) -> bool | None:
        """Return whether ``target_modules`` and ``layers`` name a layer; None: all-linear, where its kind decides."""
        if self.layers is not None:
            block = BLOCK.search(name)
            if block is None or int(block[1]) not in self.layers:
                return False
        if self.target_modules == ALL_LINEAR:
            return None
        names = self.target_names
        if names is None:
            return re.fullmatch(str(self.target_modules), name) is not None
        is_named = any(ends_with(name, wanted) for wanted in names)
        return None if ALL_LINEAR in names and not is_named else is_named

    @property
    def target_names(self) -> tuple[str, ...] | None:
        """Return ``target_modules`` as names, words such as ``mlp`` spelt out; None for a regular expression."""
        wanted = self.target_modules
        if isinstance(wanted, str):
            if not _NAMES.fullmatch(wanted) or wanted == ALL_LINEAR:
                return None
            wanted = tuple(name.strip() for name in wanted.split(",") if name.strip())
        return tuple(part for name in wanted for part in GROUPS.get(name, (name,)))

    # ---- peft's file ---------------------------------------------------------------------------------------------

    def to_peft(self, *, names: list[str], whole: list[str], base: str | None = None) -> dict[str, Any]:
        """Return ``adapter_config.json`` for the adapted layers ``names``, and those trained whole."""
        known: dict[str, Any] = {"kaiming": True, "orthogonal": True}
        fused = {name: _whole_name(name) for name in names if _whole_name(name) != name}
        ranks = {_whole_name(name): self.rank_of(name) for name in names}
        alphas = {_whole_name(name): _by_pattern(self.alpha_pattern, name, self.alpha) for name in names}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": [name for name in names if name not in fused],
            "target_parameters": list(fused.values()) or None,
            "rank_pattern": {re.escape(name): rank for name, rank in ranks.items() if rank != self.rank},
            "alpha_pattern": {re.escape(name): alpha for name, alpha in alphas.items() if alpha != self.alpha},
            "bias": self.bias,
            "modules_to_save": whole or None,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "init_lora_weights": known.get(self.init, self.init),
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any]) -> "LoRAConfig":
        """Read ``adapter_config.json``; UserError for another method than LoRA, or a setting that is not built here."""
        if raw.get("peft_type") != "LORA":
            raise UserError(f"peft_type is {raw.get('peft_type')!r}: only LORA adapters are read")
        other = {name: raw.get(name) for name in NOT_BUILT if raw.get(name)}
        if raw.get("ensure_weight_tying") and raw.get("modules_to_save"):
            other["ensure_weight_tying"] = True
        if other:
            found = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise UserError(f"the adapter uses what is not built here: {found}")
        init = str(raw.get("init_lora_weights")).lower()
        if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise UserError(
                f"init_lora_weights={init!r} changed the model's weights too: save it once more with peft's "
                "path_initial_model_for_weight_conversion, then it fits the untouched model"
            )
        targets, fused = raw.get("target_modules"), raw.get("target_parameters") or ()
        if fused:
            if isinstance(targets, str) and targets:
                raise UserError(
                    f"target_parameters together with target_modules={targets!r}, an expression, is not built here"
                )
            targets = [*(targets or ()), *(name.removesuffix("_proj") for name in fused)]
        return cls(
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            target_modules=targets if isinstance(targets, str) else tuple(targets or ()),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            bias=raw.get("bias", "none"),
            modules_to_save=tuple(raw.get("modules_to_save") or ()),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
        )


# Settings of peft's that change the result and are not built here.
NOT_BUILT = (
    "use_qalora", "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "lora_bias",
    "fan_in_fan_out", "arrow_config", "use_bdlora", "exclude_modules",
)  # fmt: skip


def ends_with(name: str, wanted: str) -> bool:
    """Return whether ``name`` ends with the parts ``wanted``: ``a.q_proj`` with ``q_proj``, but not ``a.xq_proj``."""
    return name == wanted or name.endswith(f".{wanted}")


def matches(pattern: str, name: str) -> bool:
    """Return whether the expression ``pattern`` matches the end of ``name``, from a dot on, as peft looks it up."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in (name, _whole_name(name)))


def _by_pattern(pattern: Mapping[str, Any], name: str, usual):
    """Return the value of the first pattern that matches ``name``."""
    return next((value for key, value in pattern.items() if matches(key, name)), usual)


def _whole_name(name: str) -> str:
    """Return the name of the parameter where ``name`` is a product of fused experts, else ``name``."""
    home, _, last = name.rpartition(".")
    return f"{name}_proj" if ends_with(home, "experts") and last in EXPERT_PRODUCTS else name
