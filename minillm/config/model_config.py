"""The shape of a model, under the names that Hugging Face uses."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config import families
from minillm.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    "base": {"hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 3},
    "moe": {
        "hidden_size": 640,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
    },
    "demo": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_LAYERS = 10_000  # also of experts: loops go over them
MAX_PARAMETERS = 2**50
# rope_type: required and optional keys of rope_scaling.
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
            "mscale_all_dim", "truncate",
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Its options decide the family in which it is stored (``model_type``).

    Raises:
        UserError: a value out of range, values that contradict each other, or a combination of options that no Hugging
            Face family has.
    """

    vocab_size: int = 6400
    """V, tokens."""
    hidden_size: int = 512
    """D, width of the residual stream."""
    num_hidden_layers: int = 8
    """Blocks."""
    num_attention_heads: int = 8
    """H, query heads."""
    num_key_value_heads: int = 2
    """G, key and value heads; each serves H / G query heads."""
    head_dim: int | None = None
    """K, width of a head; None: D / H."""
    intermediate_size: int | None = None
    """F, feed-forward width; None: 64 * ceil(8 D / 3 / 64)."""
    max_position_embeddings: int = 32768
    """Longest sequence, in tokens."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square before the root."""
    rope_theta: float = 1e6
    """Base of the rotary wavelengths, in positions."""
    rope_scaling: dict[str, Any] | None = None
    """How RoPE treats positions beyond the original context: ``rope_type`` and its settings (``ROPE_TYPES``).

    None is the type ``default``. For ``yarn`` and ``llama3`` the original length is filled in; as in transformers it is
    ``max_position_embeddings`` unless it is given.
    """
    partial_rotary_factor: float = 1.0
    """Share of a head that RoPE rotates (GLM)."""
    sliding_window: int | None = None
    """Number of keys that a query attends to, including its own position (Mistral); None: all earlier ones."""
    attention_bias: bool = False
    """The query, key and value projections have a bias (Qwen2)."""
    use_qk_norm: bool = False
    """RMSNorm on each head of queries and keys (Qwen3)."""
    tie_word_embeddings: bool = True
    """The embedding matrix is also the output layer."""
    num_experts: int = 0
    """E, experts from which a router chooses; 0: one feed-forward layer for all tokens."""
    num_experts_per_tok: int = 2
    """Routed experts per token."""
    moe_intermediate_size: int | None = None
    """F of one expert; None, or without experts: intermediate_size."""
    n_shared_experts: int = 0
    """Experts for every token, in addition to the routed ones."""
    shared_expert_intermediate_size: int | None = None
    """Feed-forward width of all shared experts together; None: n_shared_experts * moe_intermediate_size."""
    shared_expert_gate: bool = False
    """The shared experts' output is multiplied by the sigmoid of another projection (softmax routing only)."""
    first_k_dense_replace: int = 0
    """Number of blocks at the beginning with a dense feed-forward layer instead of experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Numbers of further blocks with a dense layer (softmax routing only)."""
    decoder_sparse_step: int = 1
    """Every decoder_sparse_step-th block has experts, first block decoder_sparse_step - 1 (softmax routing only)."""
    scoring_func: str = "softmax"
    """Scores of the router: ``softmax`` over the experts, or a ``sigmoid`` for each (DeepSeek-V3, GLM-4.5)."""
    norm_topk_prob: bool = True
    """The weights of the chosen experts are divided by their sum."""
    routed_scaling_factor: float = 1.0
    """Multiplies the weights of the routed experts (sigmoid routing only)."""
    n_group: int = 1
    """Groups of experts, of which the router first chooses ``topk_group`` (sigmoid routing only)."""
    topk_group: int = 1
    """Number of groups from which a token's experts are chosen."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    bos_token_id: int | None = None
    """First token of a document."""
    eos_token_id: int | None = None
    """Last token of a document."""
    pad_token_id: int | None = None
    """Padding token, if the tokenizer has one."""

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        self._check_whole(*sizes)
        self._check_whole("num_hidden_layers", most=MAX_LAYERS)
        # Some files write -1 for no token.
        self._check_whole(*(name for name in TOKENS if getattr(self, name) is not None), least=-1)
        for name in TOKENS:
            if (getattr(self, name) or 0) >= self.vocab_size:
                raise UserError(
                    f"{name} is {getattr(self, name)}: the {self.vocab_size} tokens (vocab_size) end at "
                    f"{self.vocab_size - 1}; correct it, or leave it out"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: each key head serves the same number of query heads"
            )
        switches = ("attention_bias", "use_qk_norm", "tie_word_embeddings", "norm_topk_prob", "shared_expert_gate")
        for name in switches:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}: choose true or false")
        # transformers refuses to open such a Llama, whatever its head_dim.
        if self.hidden_size % self.num_attention_heads and (self.head_dim is None or self.model_type == "llama"):
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                f"choose one that is (with use_qk_norm, setting head_dim will do; the Llama family does not allow it)"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 64 * -(-8 * self.hidden_size // 192))
        if self.moe_intermediate_size is None or self.num_experts == 0:
            object.__setattr__(self, "moe_intermediate_size", self.intermediate_size)
        if type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim!r}: rotary embedding turns pairs, so it must be even")
        self._check_whole("head_dim", "intermediate_size", "moe_intermediate_size", "n_group", "topk_group")
        self._check_whole("decoder_sparse_step", most=MAX_LAYERS)
        positive = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "initializer_range", "routed_scaling_factor")
        for name in positive:
            if not _is_positive(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)!r}: it must be a positive number, at most 1e18")
        self._check_positions()
        self._check_experts()
        self._check_family()
        if self.num_parameters() > MAX_PARAMETERS:
            raise UserError(f"these sizes make {self.num_parameters():.1e} parameters, which is too many: check them")

    def _check_whole(self, *names: str, least: int = 1, most: int = families.LARGEST) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least {least}, at most {most}")

    def _check_positions(self) -> None:
        if self.partial_rotary_factor > 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise UserError(
                f"partial_rotary_factor is {self.partial_rotary_factor!r}: it must be above 0, at most 1, and turn "
                f"an even number of a head's {self.head_dim} (head_dim)"
            )
        if self.sliding_window is not None:
            self._check_whole("sliding_window")
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, dict):
            raise UserError(f"rope_scaling is {self.rope_scaling!r}: it must have rope_type and its settings")
        self._check_rope_scaling(dict(self.rope_scaling))

    def _check_rope_scaling(self, scaling: dict[str, Any]) -> None:
        """Raise UserError unless ``scaling`` is complete and valid; store it in normal form."""
        kind = scaling.pop("rope_type", None)
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise UserError(f"rope_type {kind!r} is not supported; supported are: {', '.join(ROPE_TYPES)}")
        required, optional = ROPE_TYPES[kind]
        if required - set(scaling) or set(scaling) - required - optional:
            raise UserError(
                f"rope_scaling of rope_type {kind!r} has the keys {sorted(scaling)}: it needs {sorted(required)} "
                f"and may have {sorted(optional)}"
            )
        if kind in ("yarn", "llama3"):
            scaling.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        for name, value in scaling.items():
            if name == "truncate":
                is_valid, rule = isinstance(value, bool), "true or false"
            elif name == "original_max_position_embeddings":
                is_valid, rule = type(value) is int and 1 <= value <= families.LARGEST, "a whole number of at least 1"
            elif name == "factor":
                is_valid = _is_positive(value) and 1 <= value <= 1e9
                rule = "a number of at least 1 and at most 1e9"
            else:
                is_valid, rule = _is_positive(value), "a positive number, at most 1e18"
            if not is_valid:
                raise UserError(f"rope_scaling {name} is {value!r}: it must be {rule}")
        slow, fast = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
        if scaling.get(slow, 1) >= scaling.get(fast, 32):
            raise UserError(f"rope_scaling {slow} is {scaling.get(slow, 1)}: it must be below {fast}")
        original = scaling.get("original_max_position_embeddings")
        if kind == "dynamic" and original and self.max_position_embeddings != int(original * scaling["factor"]):
            raise UserError(
                f"max_position_embeddings is {self.max_position_embeddings}: dynamic scaling of {original} positions "
                f"by {scaling['factor']} gives {int(original * scaling['factor'])}"
            )
        object.__setattr__(self, "rope_scaling", None if kind == "default" else {"rope_type": kind} | scaling)

    def _check_experts(self) -> None:
        self._check_whole("num_experts", "n_shared_experts", "first_k_dense_replace", least=0, most=MAX_LAYERS)
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise UserError(f"scoring_func is {self.scoring_func!r}: choose softmax or sigmoid")
        default_width = self.n_shared_experts * self.moe_intermediate_size
        if self.shared_expert_intermediate_size in (None, 0) or not self.n_shared_experts:
            object.__setattr__(self, "shared_expert_intermediate_size", default_width)
        self._check_whole("shared_expert_intermediate_size", least=min(1, self.n_shared_experts))
        layers = self.mlp_only_layers
        is_list = isinstance(layers, list | tuple) and all(type(layer) is int and layer >= 0 for layer in layers)
        if not is_list or len(layers) > MAX_LAYERS:
            raise UserError(f"mlp_only_layers is {layers!r}: it must be a list of numbers of blocks")
        object.__setattr__(self, "mlp_only_layers", tuple(sorted(set(layers))))
        if not self.num_experts:
            return
        if type(self.num_experts_per_tok) is not int or not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"num_experts_per_tok is {self.num_experts_per_tok!r}: choose from 1 to num_experts {self.num_experts}"
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise UserError(
                f"first_k_dense_replace is {self.first_k_dense_replace}: none of the {self.num_hidden_layers} blocks "
                f"(num_hidden_layers) would have experts; choose fewer, or num_experts 0"
            )
        if not self.n_sparse_layers:
            raise UserError(
                f"mlp_only_layers {list(self.mlp_only_layers)}, decoder_sparse_step {self.decoder_sparse_step}: none "
                f"of the {self.num_hidden_layers} blocks (num_hidden_layers) would have experts; leave some in, or "
                f"num_experts 0"
            )
        per_group, rest = divmod(self.num_experts, self.n_group)
        if rest or self.topk_group > self.n_group or self.num_experts_per_tok > self.topk_group * per_group:
            raise UserError(
                f"n_group {self.n_group}, topk_group {self.topk_group}: num_experts {self.num_experts} must divide "
                f"into the groups, and those chosen must hold num_experts_per_tok {self.num_experts_per_tok} experts"
            )
        if self.scoring_func == "sigmoid" and per_group < 2:
            raise UserError(
                f"num_experts {self.num_experts} in n_group {self.n_group}: a group is scored by its 2 best experts, "
                f"so it must have at least 2"
            )

    def _check_family(self) -> None:
        """Raise UserError for options that the family of ``model_type`` does not have."""
        family = self.model_type
        allowed = {
            "attention_bias": family in ("qwen2", "qwen2_moe", "glm4_moe"),
            "use_qk_norm": family in ("qwen3", "qwen3_moe", "glm4_moe"),
            "sliding_window": family in ("mistral", "mixtral"),
            "partial_rotary_factor": family == "glm4_moe",
            "n_shared_experts": family in ("qwen2_moe", "glm4_moe"),
            "shared_expert_gate": family == "qwen2_moe",
            "first_k_dense_replace": family in ("qwen2_moe", "qwen3_moe", "glm4_moe"),
            "mlp_only_layers": family in ("qwen2_moe", "qwen3_moe"),
            "decoder_sparse_step": family in ("qwen2_moe", "qwen3_moe"),
            "routed_scaling_factor": family == "glm4_moe",
            "n_group": family == "glm4_moe",
            "topk_group": family == "glm4_moe",
            "num_experts_per_tok": self.num_experts > 0,
            "norm_topk_prob": family in ("qwen2_moe", "qwen3_moe", "glm4_moe"),
            "scoring_func": family == "glm4_moe",
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        unsupported = [name for name, is_allowed in allowed.items() if not is_allowed]
        unsupported = [name for name in unsupported if getattr(self, name) != defaults[name]]
        if family == "mixtral" and self.moe_intermediate_size != self.intermediate_size:
            unsupported.append("moe_intermediate_size")
        default_width = self.n_shared_experts * self.moe_intermediate_size
        if family == "glm4_moe" and self.shared_expert_intermediate_size != default_width:
            unsupported.append("shared_expert_intermediate_size")
        if unsupported:
            options = ", ".join(f"{name}={getattr(self, name)!r}" for name in unsupported)
            raise UserError(
                f"no family has this combination: {family} has no {options}; leave that out, or change the rest"
            )
        if family == "glm4_moe" and not self.n_shared_experts:
            raise UserError("n_shared_experts is 0: sigmoid routing (glm4_moe) has at least 1 shared expert")

    @classmethod
    def preset(cls, name: str, **overrides) -> "ModelConfig":
        """Return a named shape (``small``, ``base``, ``moe``, ``demo``) with ``overrides``."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    @property
    def model_type(self) -> str:
        """The Hugging Face family of this shape."""
        if self.num_experts:
            if self.scoring_func == "sigmoid":
                return "glm4_moe"
            if self.n_shared_experts:
                return "qwen2_moe"
            return "qwen3_moe" if self.use_qk_norm else "mixtral"
        if self.attention_bias:
            return "qwen2"
        if self.use_qk_norm:
            return "qwen3"
        return "mistral" if self.sliding_window else "llama"

    @property
    def rotary_dim(self) -> int:
        """Number of a head's dimensions that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def has_experts(self, layer: int) -> bool:
        """Return whether block ``layer`` routes its tokens to experts."""
        is_dense = layer < self.first_k_dense_replace or layer in self.mlp_only_layers
        return bool(self.num_experts) and not is_dense and (layer + 1) % self.decoder_sparse_step == 0

    @property
    def n_sparse_layers(self) -> int:
        """Number of blocks with experts."""
        return sum(map(self.has_experts, range(self.num_hidden_layers)))

    def num_parameters(self, *, active: bool = False) -> int:
        """Return the number of parameters; tied ones count once.

        The correction bias of sigmoid routing does not count: it is a buffer, updated by counts and not by a gradient.

        Args:
            active: count only the experts that one token uses.
        """
        n_heads = self.num_attention_heads + self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * 2 * n_heads + 2 * self.head_dim * self.use_qk_norm
        if self.attention_bias:
            attention += self.head_dim * (n_heads + self.num_key_value_heads)
        dense = 3 * self.hidden_size * self.intermediate_size
        n_experts = self.num_experts_per_tok if active else self.num_experts
        width = self.moe_intermediate_size * n_experts + self.shared_expert_intermediate_size
        sparse = self.hidden_size * (3 * width + self.num_experts + self.shared_expert_gate)
        n_sparse = self.n_sparse_layers
        blocks = self.num_hidden_layers * (attention + 2 * self.hidden_size)
        blocks += n_sparse * sparse + (self.num_hidden_layers - n_sparse) * dense
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + blocks + self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward per token, for rows of ``seq_len`` tokens.

        They are 6 for each parameter of a matrix product (not of the embedding lookup, not of unused experts), and
        12·H·K·T per layer for the two attention products (Chowdhery et al., PaLM, 2022, appendix B).
        """
        output = self.vocab_size * self.hidden_size
        embeddings = output * (1 if self.tie_word_embeddings else 2)
        products = self.num_parameters(active=True) - embeddings + output
        return 6 * products + 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_len

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of this model, readable by transformers 4 and 5."""
        return families.to_hf(dataclasses.asdict(self), self.model_type)

    @classmethod
    def from_hf(cls, source: "dict[str, Any] | str | Path") -> "ModelConfig":
        """Return the configuration of a Hugging Face ``config.json``.

        Args:
            source: the parsed file, its path, or its directory.

        Raises:
            UserError: the file is missing or broken, the family is not supported, or the file has a setting that this
                model does not support; no such setting is ignored.
        """
        if not isinstance(source, dict):
            raw = families.read_json(Path(source))
            try:
                return cls.from_hf(raw)
            except UserError as error:
                raise UserError(f"{source}: {error}") from None
        return cls(**families.from_hf(source, {field.name for field in dataclasses.fields(cls)}))


def _is_positive(value: Any) -> bool:
    # JSON allows integers of any size; torch accepts those below 2**63.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e18
