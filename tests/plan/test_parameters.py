"""The numbers of parameters: counted on shapes alone, equal to those of the real model."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.lora import apply_lora
from minillm.model import Transformer
from minillm.plan.parameters import count_parameters, meta_model

DENSE = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96}  # fmt: skip
SHAPES = {
    "tied": DENSE,
    "untied": DENSE | {"tie_word_embeddings": False},
    "qk_norm": DENSE | {"use_qk_norm": True, "head_dim": 24},
    "mixtral": DENSE | {"num_experts": 4},
    "shared, gated": DENSE | {"num_experts": 4, "n_shared_experts": 1, "shared_expert_gate": True},
    "shared": DENSE | {"num_experts": 4, "n_shared_experts": 3, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    "glm": DENSE | {
        "num_experts": 6, "n_shared_experts": 2, "scoring_func": "sigmoid", "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_real_model(name):
    config = ModelConfig(**SHAPES[name])
    counted, real = count_parameters(meta_model(config)), Transformer(config)
    assert counted.total == counted.trained == sum(p.numel() for p in real.parameters())
    assert counted.blocks == tuple(sum(p.numel() for p in block.parameters()) for block in real.model.layers)
    assert counted.embedding == 300 * 64
    assert counted.outside == (300 * 64) * (1 if config.tie_word_embeddings else 2) + 64
    assert counted.active == config.num_parameters(active=True)
    assert (counted.active < counted.total) == (config.num_experts > 0)


def test_an_adapter_is_what_is_trained():
    config = ModelConfig(**DENSE)
    counted, real = count_parameters(meta_model(config, lora_rank=4)), Transformer(config)
    whole = sum(p.numel() for p in real.parameters())
    apply_lora(real, rank=4)
    assert counted.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counted.total == whole + counted.trained
    assert sum(counted.trained_blocks) == counted.trained
    assert counted.cast_blocks == (0, 0, 0)


def test_cast_are_the_matrices_but_not_routers_and_norms():
    dense = count_parameters(meta_model(ModelConfig(**DENSE)))
    matrices = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 96
    assert dense.cast_blocks == dense.cached_blocks == (matrices,) * 3
    glm = count_parameters(meta_model(ModelConfig(**SHAPES["glm"])))
    attention, experts, shared = 64 * 64 * 2 + 2 * 64 * 32, 6 * 3 * 64 * 32, 3 * 64 * 64
    assert glm.cast_blocks == (matrices, *[attention + experts + shared] * 2)
    assert glm.cached_blocks == (matrices, *[attention + shared] * 2)  # experts cast their own


def test_nothing_is_allocated():
    model = meta_model(ModelConfig.preset("moe", hidden_size=4096, num_hidden_layers=2))
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
