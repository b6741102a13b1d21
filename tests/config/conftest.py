"""One shape per family, unusual wherever the family has a setting; and what transformers makes of a file."""

import json

import pytest
import torch
import transformers

from minillm.config import ModelConfig
from minillm.config.families import N_EXPERTS, WINDOWED

SHAPE = {
    "vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 3e-6, "rope_theta": 5e5,
    "initializer_range": 0.03, "bos_token_id": 5, "eos_token_id": 7,
}  # fmt: skip
SPECIAL = {
    "llama": {"head_dim": 10},
    "mistral": {"head_dim": 14, "sliding_window": 9, "tie_word_embeddings": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {"hidden_size": 50, "head_dim": 14, "use_qk_norm": True, "pad_token_id": 3},
    "mixtral": {"num_experts": 5, "num_experts_per_tok": 3, "sliding_window": 11, "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "use_qk_norm": True,
        "norm_topk_prob": False, "first_k_dense_replace": 1, "head_dim": 12,
    },
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1,
        "shared_expert_intermediate_size": 36, "shared_expert_gate": True, "attention_bias": True,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": {
        "num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 28, "n_shared_experts": 2,
        "first_k_dense_replace": 2, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "n_group": 4,
        "topk_group": 3, "norm_topk_prob": False, "attention_bias": True, "use_qk_norm": True, "head_dim": 16,
        "partial_rotary_factor": 0.75,
    },
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "dynamic, trained on 32": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all keys": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20, "beta_slow": 2,
        "attention_factor": 1.25, "mscale": 0.7, "mscale_all_dim": 0.9, "truncate": False,
    },
}  # fmt: skip


# ---- what transformers reads ----

SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "max_position_embeddings", "rms_norm_eps", "initializer_range", "tie_word_embeddings",
    "bos_token_id", "pad_token_id",
)  # fmt: skip
GLM = (
    "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group", "use_qk_norm",
    "attention_bias",
)  # fmt: skip


def meaning(theirs) -> dict:
    """Return what a configuration of transformers means, in our names: as its model classes read it."""
    said = {name: getattr(theirs, name) for name in SIZES}
    said["head_dim"] = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    end = theirs.eos_token_id
    said["eos_token_id"] = end[0] if isinstance(end, list) else end
    theirs.standardize_rope_params()  # as their models do before they compute the angles
    rope = {name: value for name, value in theirs.rope_parameters.items() if value is not None}
    said["rope_theta"] = rope.pop("rope_theta")
    said["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
    rope.pop("type", None)
    if rope["rope_type"] == "dynamic":
        rope.pop("original_max_position_embeddings", None)  # they take max_position_embeddings
    said["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    kind = theirs.model_type
    said["sliding_window"] = theirs.sliding_window if kind in WINDOWED else None
    said["attention_bias"] = kind == "qwen2" or (kind == "qwen2_moe" and theirs.qkv_bias)
    said["use_qk_norm"] = kind in ("qwen3", "qwen3_moe")
    if kind in N_EXPERTS:
        is_own = kind == "qwen2_moe"  # in the others: attribute_map
        said["num_experts"] = theirs.num_experts if is_own else theirs.num_local_experts
        said["num_experts_per_tok"] = theirs.num_experts_per_tok
        said["moe_intermediate_size"] = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        said["norm_topk_prob"] = getattr(theirs, "norm_topk_prob", True)
        said["scoring_func"] = "sigmoid" if kind == "glm4_moe" else "softmax"
    if kind in ("qwen2_moe", "qwen3_moe"):
        said["decoder_sparse_step"] = theirs.decoder_sparse_step
        said["first_k_dense_replace"] = len(theirs.mlp_only_layers)
    if kind == "qwen2_moe":
        said["shared_expert_intermediate_size"] = theirs.shared_expert_intermediate_size
    return said | ({name: getattr(theirs, name) for name in GLM} if kind == "glm4_moe" else {})


def open_theirs(values: dict):
    """Return transformers' configuration of a parsed config.json; it writes into nested values, hence the copy."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(values)))


def reduced(scaling: dict | None, max_positions: int) -> tuple[dict | None, int]:
    """Return (scaling, positions) without the original length of ``dynamic``: theirs is max_position_embeddings."""
    if scaling and scaling["rope_type"] == "dynamic" and "original_max_position_embeddings" in scaling:
        return {"rope_type": "dynamic", "factor": scaling["factor"]}, scaling["original_max_position_embeddings"]
    return scaling, max_positions


def assert_same(config: ModelConfig, theirs) -> None:
    """Fail unless every value is equal; what ``meaning`` leaves out has ModelConfig's own default."""
    wanted = meaning(theirs)
    ours = {name: getattr(config, name) for name in wanted}
    ours["rope_scaling"], ours["max_position_embeddings"] = reduced(config.rope_scaling, config.max_position_embeddings)
    assert ours == wanted


def parameters_of(values: dict) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(open_theirs(values))
    return sum(parameter.numel() for parameter in model.parameters())


def pytest_generate_tests(metafunc):
    """Every family; where there is a scaling, too, each family with two of the seven, each of them at least twice."""
    if "scaling" in metafunc.fixturenames:
        names = list(SCALINGS)
        pairs = [(family, names[(number + shift) % 7]) for number, family in enumerate(SPECIAL) for shift in (0, 3)]
        values = [(family, SCALINGS[name]) for family, name in pairs]
        metafunc.parametrize("family, scaling", values, ids=["-".join(pair) for pair in pairs])
    elif "family" in metafunc.fixturenames:
        metafunc.parametrize("family", SPECIAL)


@pytest.fixture
def make_config():
    """Return the configuration of a family, with changes."""

    def make(family: str, **changes) -> ModelConfig:
        return ModelConfig(**(SHAPE | SPECIAL[family] | changes))

    return make


@pytest.fixture
def tools():
    """Give tests the functions of this file (test modules cannot import one another)."""

    class Tools:
        assert_same, open_theirs = staticmethod(assert_same), staticmethod(open_theirs)
        parameters_of = staticmethod(parameters_of)

    return Tools
