"""The shape of a model, under the names that Hugging Face uses, and the way to and from their ``config.json``."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import UserError

PRESETS: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    "base": {"hidden_size": 768, "num_hidden_layers": 16, "num_attention_heads": 12, "num_key_value_heads": 3},
    "demo": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense decoder-only transformer: Llama's shape, or Qwen3's with ``use_qk_norm``.

    Raises:
        UserError: a value out of range, or values that do not fit each other.
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
    tie_word_embeddings: bool = True
    """The embedding matrix is the output layer too."""
    use_qk_norm: bool = False
    """RMSNorm on each head of queries and keys (Qwen3)."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""
    bos_token_id: int | None = None
    """First token of a document."""
    eos_token_id: int | None = None
    """Token that ends a document."""
    pad_token_id: int | None = None
    """Padding, if a tokenizer has one."""

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in (*sizes, "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}: it must be a whole number of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}: each key head serves the same number of query heads"
            )
        if self.hidden_size % self.num_attention_heads and (self.head_dim is None or not self.use_qk_norm):
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                f"choose one that is (with use_qk_norm, setting head_dim will do; the Llama family does not allow it)"
            )
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", 64 * -(-8 * self.hidden_size // 192))
        if type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim!r}: rotary embedding turns pairs, so it must be even")
        if type(self.intermediate_size) is not int or self.intermediate_size < 1:
            raise UserError(f"intermediate_size is {self.intermediate_size!r}: it must be a whole number of at least 1")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UserError(f"{name} is {value!r}: it must be a positive number")

    @classmethod
    def preset(cls, name: str, **overrides) -> "ModelConfig":
        """Return a named shape (``small``, ``base``, ``demo``) with ``overrides``."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | overrides))

    @property
    def model_type(self) -> str:
        """Return the Hugging Face family that holds this shape."""
        return "qwen3" if self.use_qk_norm else "llama"

    def num_parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        block = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        block += 2 * self.head_dim * self.use_qk_norm
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """Return the FLOPs of forward and backward per token of a row of ``seq_len`` tokens.

        6 per parameter that multiplies (the embedding lookup does not), and 12·H·K·T per layer for the two
        attention products (Chowdhery et al., PaLM, 2022, appendix B).
        """
        output = self.vocab_size * self.hidden_size
        embeddings = output * (1 if self.tie_word_embeddings else 2)
        products = self.num_parameters() - embeddings + output
        return 6 * products + 12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * seq_len

    def to_hf(self) -> dict[str, Any]:
        """Return the ``config.json`` of this model, readable by transformers 4 and 5."""
        values = dataclasses.asdict(self)
        del values["use_qk_norm"]
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            **values,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "torch_dtype": "float32",
            "use_cache": True,
        }

    @classmethod
    def from_hf(cls, source: "dict[str, Any] | str | Path") -> "ModelConfig":
        """Return the configuration that a Hugging Face ``config.json`` describes.

        Args:
            source: the parsed file, its path, or the directory that holds it.

        Raises:
            UserError: the file is missing or broken, the family is not supported, or it uses a setting that
                this model does not have; nothing is silently ignored.
        """
        raw = source if isinstance(source, dict) else _read_json(Path(source))
        model_type = raw.get("model_type")
        if model_type not in ARCHITECTURES:
            raise UserError(f"model_type {model_type!r} is not supported; supported are: {', '.join(ARCHITECTURES)}")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # where both stand, theirs takes the first
        _refuse_unsupported(raw, rope)
        names = {field.name for field in dataclasses.fields(cls)} - {"use_qk_norm"}
        values = {name: raw[name] for name in names if raw.get(name) is not None}
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))  # their default: no grouping
        theta = rope.get("rope_theta", raw.get("rope_theta"))
        values["rope_theta"] = float(10000.0 if theta is None else theta)  # their default differs from ours
        values["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
        values.setdefault("rms_norm_eps", 1e-6)
        if model_type == "qwen3":
            values.setdefault("head_dim", 128)
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = values["eos_token_id"][0]
        return cls(**values, use_qk_norm=model_type == "qwen3")


def _read_json(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no model configuration: {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object with the model's settings, but a {type(content).__name__}")
    return content


def _refuse_unsupported(raw: dict[str, Any], rope: dict[str, Any]) -> None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(raw.get("layer_types") or [])
    sliding = raw.get("use_sliding_window") or bool(layer_types - {"full_attention"})
    refused = {
        "rope_type": rope_type if rope_type != "default" else None,
        "partial_rotary_factor": _unless(1.0, rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))),
        "attention_bias": raw.get("attention_bias") or None,
        "mlp_bias": raw.get("mlp_bias") or None,
        "use_sliding_window": sliding or None,
        "hidden_act": _unless("silu", raw.get("hidden_act")),
        "attention_dropout": raw.get("attention_dropout") or None,
        "pretraining_tp": _unless(1, raw.get("pretraining_tp")),
        "quantization_config": raw.get("quantization_config"),
    }
    found = [f"{name}={value!r}" for name, value in refused.items() if value is not None]
    if found:
        raise UserError(f"the configuration uses what this model does not have: {', '.join(found)}")


def _unless(usual, value):
    return None if value is None or value == usual else value
