"""All settings of an adapter, its layers and variant; and the same as peft's ``adapter_config.json``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora import core
from minillm.lora.core import ALL_LINEAR, LoRA, ends_with
from minillm.lora.more.experts import ADAPTABLE, EXPERT_PRODUCTS, new_slot
from minillm.lora.more.init import INITS_WITH_STD, RESIDUAL_INITS, Init, initialize
from minillm.lora.more.layers import DoRA

# Words for target_modules, and the names of layers that they mean.
GROUPS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "experts": ("experts.gate_up", "experts.down"),
}
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")  # the number of a layer's block in its name
_NAMES = re.compile(r"[\w.,\s-]+")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(core.LoRAConfig):
    """The settings of one adapter. Ranks and alphas may differ by layer; everything else holds for all of it.

    ``target_modules`` may also be attention, mlp, experts, or a regular expression that the whole name must match.
    """

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
    """Scale by alpha/sqrt(rank) (Kalajdzievski, rsLoRA, 2023): large ranks then learn as fast as small ones."""
    use_dora: bool = False
    """Train the length of every row of the weight too."""
    init: Init = "kaiming"
    """What A and B start with."""
    init_std: float = 0.0
    """Standard deviation of A with init gaussian (0: 1/rank) or orthogonal (0: 0.005)."""

    words: ClassVar[tuple[str, ...]] = (ALL_LINEAR, *GROUPS)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rank", "alpha"):
            for pattern, value in getattr(self, f"{key}_pattern").items():
                try:
                    core.LoRAConfig(**{key: value})
                except UserError as error:
                    raise UserError(f"{key}_pattern {pattern!r}: {error}") from None
        expressions = [*self.rank_pattern, *self.alpha_pattern, *([self.target_modules] if self.is_expression else [])]
        for text in expressions:
            try:
                re.compile(text)
            except re.error as error:
                raise UserError(f"{text!r} is not a regular expression: {error}; e.g. .*q_proj") from None
        if isinstance(self.modules_to_save, str) or not all(isinstance(name, str) for name in self.modules_to_save):
            raise UserError(f"modules_to_save is {self.modules_to_save!r}: give names as a tuple, e.g. ('lm_head',)")
        if self.bias not in ("none", "all", "lora_only"):
            raise UserError(f"bias is {self.bias!r}: choose none, all or lora_only")
        if not 0 <= self.init_std <= 1:
            raise UserError(f"init_std is {self.init_std!r}: give a number from 0 (the init's own) to 1")
        if self.init_std and self.init not in INITS_WITH_STD:
            inits = " or ".join(INITS_WITH_STD)
            raise UserError(f"init_std does not work with init {self.init!r}: choose {inits}")
        if self.use_dora and self.init in RESIDUAL_INITS:
            raise UserError(f"use_dora does not work with init {self.init!r}: choose kaiming, gaussian or orthogonal")

    # ---- the adapter of a layer ----------------------------------------------------------------------------------

    def rank_of(self, name: str) -> int:
        """Return the rank of the layer ``name``."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scaling_of(self, name: str) -> float:
        """Return s of the layer ``name``."""
        rank = self.rank_of(name)
        return _by_pattern(self.alpha_pattern, name, self.alpha) / (rank**0.5 if self.use_rslora else rank)

    @torch.no_grad()
    def new_lora(self, name: str, layer: nn.Module, generator: torch.Generator | None = None) -> LoRA:
        """Return an initialized adapter for the layer ``name``; UserError where ``init`` does not work for it."""
        lora = new_slot(layer, rank=self.rank_of(name), dropout=self.dropout, use_dora=self.use_dora,
                        has_residual=self.init in RESIDUAL_INITS)  # fmt: skip
        scaling = self.scaling_of(name)
        lora.scaling.fill_(scaling)
        initialize(lora, layer, self.init, scaling=scaling, std=self.init_std, generator=generator)
        if isinstance(lora, DoRA):
            delta = scaling * lora.B.weight @ lora.A.weight
            lora.magnitude.copy_((layer.weight.to(delta) + delta).norm(dim=1))
        return lora

    # ---- the layers ----------------------------------------------------------------------------------------------

    @property
    def is_expression(self) -> bool:
        """Return whether ``target_modules`` is a regular expression."""
        return isinstance(self.target_modules, str) and not _NAMES.fullmatch(self.target_modules)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Return ``target_modules`` as names, with words such as ``mlp`` expanded; none for a regular expression."""
        if self.is_expression:
            return ()
        return tuple(part for name in super().target_names for part in GROUPS.get(name, (name,)))

    def is_target(self, name: str) -> bool | None:
        """Return whether ``target_modules`` and ``layers`` name a layer; None: not by name, but by its kind."""
        if self.layers is not None:
            block = BLOCK.search(name)
            if block is None or int(block[1]) not in self.layers:
                return False
        if self.is_expression:
            return re.fullmatch(str(self.target_modules), name) is not None
        return super().is_target(name)

    def can_adapt(self, layer: nn.Module) -> bool:
        """Return whether there is an adapter for this kind of layer."""
        return isinstance(layer, ADAPTABLE)

    def find_targets(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt, in the order of the model.

        Raises:
            UserError: a name, a number of a block or a pattern fits no layer; an adapter there would have no effect.
        """
        if self.layers is not None:
            blocks = (BLOCK.search(name) for name, module in model.named_modules() if self.can_adapt(module))
            numbers = {int(block[1]) for block in blocks if block}
            if absent := [number for number in self.layers if number not in numbers]:
                there_are = f"0 to {max(numbers)}" if numbers else "none"
                absent = ", ".join(map(str, absent))
                raise UserError(f"layers {absent}: the model has no such block; its blocks are {there_are}")
        names = []
        for name in super().find_targets(model):
            why_bypassed = _why_bypassed(model, name)
            if any(f".{trained_whole}." in f".{name}." for trained_whole in self.modules_to_save):
                continue
            if not why_bypassed:
                names.append(name)
            elif self.is_target(name):
                raise UserError(f"{name} {why_bypassed}: an adapter there would have no effect; leave it out")
        if not names:
            raise UserError(f"no layer is left for target_modules={self.target_modules!r}: choose other names")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(matches(pattern, name) for name in names):
                kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
                raise UserError(f"the pattern {pattern!r} matches no adapted layer: there are {', '.join(kinds)}")
        return names

    # ---- peft's file ---------------------------------------------------------------------------------------------

    def to_peft(self, *, names: list[str], whole: list[str], base: str | None = None) -> dict[str, Any]:
        """Return ``adapter_config.json`` for the adapted layers ``names``, and those trained whole."""
        known_inits: dict[str, Any] = {"kaiming": True, "orthogonal": True}
        fused = {name: _parameter_name(name) for name in names if _parameter_name(name) != name}
        ranks = {_parameter_name(name): self.rank_of(name) for name in names}
        alphas = {_parameter_name(name): _by_pattern(self.alpha_pattern, name, self.alpha) for name in names}
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
            "init_lora_weights": known_inits.get(self.init, self.init),
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any]) -> "LoRAConfig":
        """Read ``adapter_config.json``; UserError for another method than LoRA, or a setting not supported here."""
        if raw.get("peft_type") != "LORA":
            raise UserError(f"peft_type is {raw.get('peft_type')!r}: only LORA adapters are read")
        other = {name: raw.get(name) for name in NOT_SUPPORTED if raw.get(name)}
        if raw.get("ensure_weight_tying") and raw.get("modules_to_save"):
            other["ensure_weight_tying"] = True
        if other:
            settings = ", ".join(f"{name}={value!r}" for name, value in other.items())
            raise UserError(f"the adapter uses settings that are not supported here: {settings}")
        init = str(raw.get("init_lora_weights")).lower()
        if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise UserError(
                f"init_lora_weights={init!r} changed the model's weights too: save it once more with peft's "
                "path_initial_model_for_weight_conversion, then it fits the original model"
            )
        targets, fused = raw.get("target_modules"), raw.get("target_parameters") or ()
        if fused:
            if isinstance(targets, str) and targets:
                raise UserError(
                    f"target_parameters together with target_modules={targets!r}, an expression, is not supported here"
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


# Settings of peft's that change the result and are not supported here.
NOT_SUPPORTED = (
    "use_qalora", "alora_invocation_tokens", "trainable_token_indices", "layer_replication", "lora_bias",
    "fan_in_fan_out", "arrow_config", "use_bdlora", "exclude_modules",
)  # fmt: skip


def _why_bypassed(model: nn.Module, name: str) -> str:
    """Return why an adapter of a layer would not take part in what the model computes; empty: it would."""
    layer, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    is_plain = type(layer).forward is nn.Linear.forward and isinstance(layer._parameters.get("weight"), nn.Parameter)
    if isinstance(layer, nn.Linear) and not is_plain:
        return f"is a {type(layer).__name__}, which computes in its own way"
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"belongs to a {type(parent).__name__}, which does not call its forward"
    return ""


def matches(pattern: str, name: str) -> bool:
    """Return whether the expression ``pattern`` matches the end of ``name``, from a dot on, as peft looks it up."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", each) for each in (name, _parameter_name(name)))


def _by_pattern(pattern: Mapping[str, Any], name: str, default):
    """Return the value of the first pattern that matches ``name``."""
    return next((value for key, value in pattern.items() if matches(key, name)), default)


def _parameter_name(name: str) -> str:
    """Return the name of the parameter where ``name`` is a product of fused experts, else ``name``."""
    home, _, last = name.rpartition(".")
    return f"{name}_proj" if ends_with(home, "experts") and last in EXPERT_PRODUCTS else name
