"""Directories of MiniMind's own class: which family they are, and what in them is refused."""

import pytest

from minillm.config import ModelConfig
from minillm.errors import UserError

# What MiniMind's own classes wrote: version 3 under transformers 5, version 2 before.
MINIMIND = {"model_type": "minimind", "vocab_size": 97, "dropout": 0.0, "flash_attn": True, "rope_parameters": None}
MINIMIND_2 = {
    "use_moe": False, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "scoring_func": "softmax", "aux_loss_alpha": 0.01, "seq_aux": True, "inference_rope_scaling": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "said, model_type, wanted",
    [
        ({}, "qwen3", {"hidden_size": 768, "num_key_value_heads": 4, "intermediate_size": 2432, "rms_norm_eps": 1e-6}),
        ({"hidden_size": 512, "head_dim": 32}, "qwen3", {"head_dim": 32, "intermediate_size": 1664}),
        (
            {"use_moe": True, "hidden_size": 64, "num_experts": 6, "norm_topk_prob": True},
            "qwen3_moe",
            {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 256, "norm_topk_prob": True},
        ),
        # Its code of September 2026 takes the probability of a token's only expert as its weight.
        ({"use_moe": True, "norm_topk_prob": False}, "qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": False}),
        ({"use_moe": True, "num_experts_per_tok": 2}, "qwen3_moe", {"num_experts_per_tok": 2, "norm_topk_prob": True}),
        ({"num_experts": 4, "moe_intermediate_size": 99}, "qwen3", {"num_experts": 0}),
        (
            MINIMIND_2 | {"use_moe": True, "n_shared_experts": 2, "intermediate_size": None},
            "qwen2_moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "moe_intermediate_size": 1408,
                "n_shared_experts": 2,
                "shared_expert_intermediate_size": 2816,
                "shared_expert_gate": False,
                "attention_bias": False,
                "rms_norm_eps": 1e-5,
            },
        ),
        (
            MINIMIND_2 | {"use_moe": True, "num_experts_per_tok": 1},
            "qwen2_moe",
            {"num_experts_per_tok": 1, "norm_topk_prob": False},
        ),
        (MINIMIND_2 | {"use_moe": True, "n_shared_experts": 0}, "mixtral", {"num_experts": 4, "n_shared_experts": 0}),
        (
            MINIMIND_2 | {"intermediate_size": None},
            "llama",
            {"hidden_size": 512, "num_key_value_heads": 2, "intermediate_size": 1408, "rms_norm_eps": 1e-5},
        ),
        (MINIMIND_2 | {"num_key_value_heads": None, "intermediate_size": 70}, "llama", {"num_key_value_heads": 8}),
    ],
)
def test_minimind_s_own_class_is_a_family_of_theirs(said, model_type, wanted):
    config = ModelConfig.from_hf(MINIMIND | said)
    usual = {"vocab_size": 97, "num_attention_heads": 8, "rope_theta": 1e6, "tie_word_embeddings": True}
    wanted = usual | {"max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2} | wanted
    assert config.model_type == model_type
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "said, message",
    [
        ({"inference_rope_scaling": True}, "inference_rope_scaling=True: .* inference_rope_scaling false"),
        ({"dropout": 0.1}, r"dropout=0\.1: .* dropout 0"),
        ({"use_moe": True}, "has no norm_topk_prob: .* add true; .* add false"),
        (
            MINIMIND_2 | {"use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1},
            "mixtral has no norm_topk_prob=False",
        ),
        ({"dim": 512, "n_layers": 8}, r"dim=512: .* older releases give the \.pth"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_moe": True, "norm_topk_prob": True, "scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"hidden_size": "512"}, "hidden_size is '512'"),
    ],
)
def test_minimind_s_settings_that_no_family_has(said, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(MINIMIND | said)
