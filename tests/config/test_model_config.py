"""The configuration: derived sizes, presets, counts, refusals."""

import dataclasses

import pytest
import torch
import transformers

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.model import Transformer


def test_derived_sizes():
    config = ModelConfig(hidden_size=384, num_attention_heads=6)
    assert (config.head_dim, config.intermediate_size) == (64, 1024)  # 8 · 384 / 3 = 1,024
    assert ModelConfig(hidden_size=512).intermediate_size == 1408  # 1,365.3 rounded up to a multiple of 64
    assert ModelConfig(hidden_size=384, num_attention_heads=6, num_experts=3).moe_intermediate_size == 1024
    assert ModelConfig(intermediate_size=100, num_experts=3).moe_intermediate_size == 100


def test_a_dense_model_follows_when_its_width_is_replaced():
    config = dataclasses.replace(ModelConfig(intermediate_size=100), intermediate_size=200)
    assert config == ModelConfig(intermediate_size=200)


def test_rotary_dim(make_config):
    assert make_config("llama").rotary_dim == 10
    assert make_config("glm4_moe").rotary_dim == 12  # 0.75 of 16


def test_has_experts(make_config):
    assert not any(make_config("mistral").has_experts(layer) for layer in range(3))
    assert [make_config("mixtral").has_experts(layer) for layer in range(3)] == [True, True, True]
    assert [make_config("glm4_moe").has_experts(layer) for layer in range(3)] == [False, False, True]


def test_family_follows_from_the_options(make_config, family):
    assert make_config(family).model_type == family


# ---- presets and counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n_parameters", [("small", 25_829_888), ("base", 104_030_976), ("demo", 918_656)])
def test_presets_have_the_stated_size(name, n_parameters):
    config = ModelConfig.preset(name)
    assert config.num_parameters() == config.num_parameters(active=True) == n_parameters
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == n_parameters


def test_the_moe_preset_has_the_stated_size():
    """640 × 8, 8 heads of 80, 2 kv heads, F = 64·⌈8·640/3/64⌉ = 1,728, 4 routed experts and 1 shared, top-2."""
    config = ModelConfig.preset("moe")
    expert = 3 * 640 * 1728
    rest = 2 * 640 * 640 + 2 * 640 * 160 + 640 * 4 + 2 * 640  # attention, router, norms
    outside = 6400 * 640 + 640
    assert config.num_parameters() == 8 * (5 * expert + rest) + outside == 145_029_760
    assert config.num_parameters(active=True) == 8 * (3 * expert + rest) + outside == 91945600
    assert config.model_type == "glm4_moe"
    assert (config.partial_rotary_factor, config.first_k_dense_replace) == (1.0, 0)


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(UserError, match="unknown preset 'huge'; there are: small, base, moe, demo"):
        ModelConfig.preset("huge")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_counts_them(make_config, family, tied):
    """Their correction bias of sigmoid routing is a buffer, which neither counts."""
    config = make_config(family, tie_word_embeddings=tied)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config.to_hf()))
    assert config.num_parameters() == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_qk_norm": True, "head_dim": 40},
        {"num_experts": 3, "scoring_func": "sigmoid", "n_shared_experts": 2, "first_k_dense_replace": 1},
        {"num_experts": 3, "n_shared_experts": 2},
        {"num_experts": 3, "n_shared_experts": 1, "shared_expert_gate": True, "shared_expert_intermediate_size": 70},
        {"num_experts": 3, "n_shared_experts": 1, "shared_expert_gate": True, "decoder_sparse_step": 2},
    ],
)
def test_parameters_are_counted(changes):
    config = ModelConfig(num_hidden_layers=2, **changes)
    with torch.device("meta"):
        assert config.num_parameters() == sum(p.numel() for p in Transformer(config).parameters())


def test_active_parameters_leave_out_the_experts_not_chosen(make_config):
    config = make_config("glm4_moe")  # one sparse block, 12 experts of width 28, top-3
    assert config.num_parameters() - config.num_parameters(active=True) == (12 - 3) * 3 * 48 * 28
    gated = make_config("qwen2_moe")  # one sparse block of 3, 6 experts of width 20, top-2
    assert gated.num_parameters() - gated.num_parameters(active=True) == (6 - 2) * 3 * 48 * 20
    dense = make_config("qwen3")
    assert dense.num_parameters() == dense.num_parameters(active=True)


def test_flops_of_a_token():
    """Two per weight and product forward, four backward; scores and mixing 2·H·K·T each, three times."""
    config = ModelConfig.preset("demo")
    matrices = 4 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 384) + 128 * 1024
    norms = 9 * 128
    assert config.flops_per_token(100) == 6 * (matrices + norms) + 4 * 3 * 2 * 2 * 128 * 100


def test_flops_of_a_token_that_meets_two_experts_of_five(make_config):
    config = make_config("mixtral", num_experts_per_tok=2)
    attention, expert = 48 * (48 + 16 + 16 + 48), 3 * 48 * 100
    counted = 3 * (attention + 2 * expert + 5 * 48 + 2 * 48) + 48 + 83 * 48  # untied: the output layer alone
    assert config.flops_per_token(7) == 6 * counted + 3 * 3 * 2 * 2 * 48 * 7


# ---- refusals ----------------------------------------------------------------------------------------------------

MOE = {"num_experts": 6}
GLM = {"num_experts": 6, "scoring_func": "sigmoid", "n_shared_experts": 1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is not a multiple of num_key_value_heads 4"),
        ({"hidden_size": 100}, "hidden_size 100 is not a multiple of num_attention_heads 8"),
        ({"hidden_size": 100, "head_dim": 8}, "the Llama family does not allow it"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"head_dim": 8.0}, r"head_dim is 8\.0"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"intermediate_size": 100.0}, r"intermediate_size is 100\.0"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"use_qk_norm": 1}, "use_qk_norm is 1: choose true or false"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": 4.0}, r"sliding_window is 4\.0"),
        # part of a head
        (GLM | {"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        (GLM | {"partial_rotary_factor": "0.5"}, "partial_rotary_factor is '0.5'"),
        (GLM | {"partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1\.5: it must be .* at most 1"),
        (GLM | {"partial_rotary_factor": 0.01}, r"partial_rotary_factor is 0\.01: .* an even number of a head's 64"),
        (GLM | {"head_dim": 42, "partial_rotary_factor": 0.5}, "an even number of a head's 42"),
        # experts
        ({"num_experts": -1}, "num_experts is -1"),
        ({"num_experts": 4.0}, r"num_experts is 4\.0"),
        (MOE | {"num_experts_per_tok": 7}, "num_experts_per_tok is 7: choose from 1 to num_experts 6"),
        (MOE | {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        (MOE | {"use_qk_norm": True, "moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        (MOE | {"use_qk_norm": True, "first_k_dense_replace": 8}, "none of the 8 blocks"),
        (MOE | {"scoring_func": "tanh"}, "scoring_func is 'tanh': choose softmax or sigmoid"),
        (MOE | {"norm_topk_prob": None}, "norm_topk_prob is None"),
        (GLM | {"n_group": 4}, "n_group 4, topk_group 1: num_experts 6 must divide"),
        (GLM | {"n_group": 2, "topk_group": 3}, "n_group 2, topk_group 3"),
        (GLM | {"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "must hold num_experts_per_tok 3 experts"),
        (GLM | {"n_group": 6, "topk_group": 6}, "num_experts 6 in n_group 6: .* at least 2"),
        (GLM | {"num_experts": 1, "num_experts_per_tok": 1}, "num_experts 1 in n_group 1: .* at least 2"),
        (GLM | {"n_group": 0}, "n_group is 0"),
        (GLM | {"n_shared_experts": 0}, "n_shared_experts is 0"),
        (GLM | {"routed_scaling_factor": 0.0}, r"routed_scaling_factor is 0\.0"),
        # what no tensor can be
        ({"hidden_size": 10**400}, "hidden_size is 10+: it must be a whole number of at least 1, at most 2147483647"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: .* at most 10000"),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**29}, "parameters, which is too many"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10+: it must be a positive number, at most 1e18"),
        ({"rope_theta": 2**63}, "rope_theta is 9223372036854775808: it must be a positive number, at most 1e18"),
        ({"eos_token_id": [2]}, r"eos_token_id is \[2\]: it must be a whole number"),
        # scaling of positions
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type \['yarn'\] is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e300}}, r"factor is 1e\+300: .* at most 1e9"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type None is not supported; supported are: default, linear"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"has the keys \[\]: it needs \['factor'\] and may have .*beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "scale": 3}}, r"\['factor', 'scale'\]: it needs"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"'default' has the keys \['factor'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "it needs .*high_freq_factor.*low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5: it must be a number of at least"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor is True"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, r"low_freq_factor is 4\.0: it must be below high_freq"),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192.0}}, r"embeddings is 8192\.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "beta_fast": 1}}, "beta_slow is 1: it must be below"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 0}}, "truncate is 0: it must be true or"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 100}},
            "max_position_embeddings is 32768: dynamic scaling of 100 positions by 2.0 gives 200",
        ),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention_bias": True, "use_qk_norm": True}, "qwen2 has no use_qk_norm=True"),
        ({"attention_bias": True, "sliding_window": 8}, "qwen2 has no sliding_window=8"),
        ({"use_qk_norm": True, "sliding_window": 8}, "qwen3 has no sliding_window=8"),
        ({"partial_rotary_factor": 0.5}, r"llama has no partial_rotary_factor=0\.5"),
        # without experts
        ({"scoring_func": "sigmoid"}, "llama has no scoring_func='sigmoid'"),
        ({"n_shared_experts": 1}, "llama has no n_shared_experts=1"),
        ({"num_experts_per_tok": 3}, "llama has no num_experts_per_tok=3"),
        ({"norm_topk_prob": False, "use_qk_norm": True}, "qwen3 has no norm_topk_prob=False"),
        ({"first_k_dense_replace": 1}, "llama has no first_k_dense_replace=1"),
        ({"topk_group": 2}, "llama has no topk_group=2"),
        # softmax routing
        (MOE | {"n_shared_experts": 1, "use_qk_norm": True}, "qwen2_moe has no use_qk_norm=True"),
        (MOE | {"n_shared_experts": 1, "sliding_window": 8}, "qwen2_moe has no sliding_window=8"),
        (MOE | {"shared_expert_gate": True}, "mixtral has no shared_expert_gate=True"),
        (MOE | {"decoder_sparse_step": 2}, "mixtral has no decoder_sparse_step=2"),
        (MOE | {"norm_topk_prob": False}, "mixtral has no norm_topk_prob=False"),
        (MOE | {"moe_intermediate_size": 77}, "mixtral has no moe_intermediate_size=77"),
        (MOE | {"first_k_dense_replace": 1}, "mixtral has no first_k_dense_replace=1"),
        (MOE | {"attention_bias": True}, "mixtral has no attention_bias=True"),
        (MOE | {"n_group": 2, "topk_group": 2}, "mixtral has no n_group=2, topk_group=2"),
        (MOE | {"use_qk_norm": True, "sliding_window": 8}, "qwen3_moe has no sliding_window=8"),
        (MOE | {"use_qk_norm": True, "routed_scaling_factor": 2.5}, r"qwen3_moe has no routed_scaling_factor=2\.5"),
        (MOE | {"use_qk_norm": True, "partial_rotary_factor": 0.5}, r"qwen3_moe has no partial_rotary_factor=0\.5"),
        # sigmoid routing
        (GLM | {"shared_expert_gate": True}, "glm4_moe has no shared_expert_gate=True"),
        (GLM | {"shared_expert_intermediate_size": 9}, "glm4_moe has no shared_expert_intermediate_size=9"),
        (GLM | {"mlp_only_layers": [3]}, r"glm4_moe has no mlp_only_layers=\(3,\)"),
        (GLM | {"sliding_window": 8}, "glm4_moe has no sliding_window=8"),
    ],
)
def test_mixtures_of_families_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=f"no family has this combination: {message}; leave that out, or change"):
        ModelConfig(**changes)


@pytest.mark.parametrize("options", [{"use_qk_norm": True}, {"sliding_window": 9}, {"attention_bias": True}, MOE, GLM])
def test_only_llama_ties_the_width_to_the_heads(options):
    assert ModelConfig(hidden_size=100, head_dim=8, **options).head_dim == 8


def test_rope_scaling_has_one_form():
    assert ModelConfig(rope_scaling={"rope_type": "default"}) == ModelConfig()
    given = dict(LLAMA3)
    config = ModelConfig(max_position_embeddings=512, rope_scaling=given)
    assert config.rope_scaling == LLAMA3 | {"original_max_position_embeddings": 512}
    given["factor"] = 3.0
    assert config.rope_scaling["factor"] == 8.0
    longer = dataclasses.replace(config, max_position_embeddings=4096)
    assert longer.rope_scaling["original_max_position_embeddings"] == 512
