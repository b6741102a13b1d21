"""Shapes that differ where mistakes hide, and transformers' models with the same weights."""

import importlib

import pytest
import torch
import transformers

from minillm.config import ModelConfig
from minillm.config.families import ARCHITECTURES
from minillm.model import Transformer

TINY = {"vocab_size": 83, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64, "rope_theta": 1e4}
SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 100},
    "one kv head, wide heads": {
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 14, "intermediate_size": 77,
    },
    "no groups, untied": {
        "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 64, "tie_word_embeddings": False,
    },
    "narrow heads, untied": {
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "intermediate_size": 33,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
# Each family with all that it alone has. The window is shorter than most rows and documents of the tests, and of five
# to seven experts some get no token.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True},
    "mixtral": {"num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "use_qk_norm": True, "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 18,
        "norm_topk_prob": False,
    },
    "qwen2_moe": {
        "attention_bias": True, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 18,
        "n_shared_experts": 1, "shared_expert_intermediate_size": 26, "shared_expert_gate": True,
        "decoder_sparse_step": 2,
    },
    "glm4_moe": {
        "use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.75, "scoring_func": "sigmoid",
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "n_shared_experts": 2,
        "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "n_group": 3, "topk_group": 2,
    },
}  # fmt: skip


def make_config(shape: str = "grouped", family: str = "llama", **changes) -> ModelConfig:
    return ModelConfig(**(TINY | SHAPES[shape] | FAMILIES[family] | changes))


def make_model(config: ModelConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """Return a model with weights and biases large enough, and norms uneven enough, that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise * 0.15 if tensor.ndim > 1 or name.endswith("bias") else 1 + 0.3 * noise)
    return model.to(dtype)


def make_reference(model: Transformer, **options):
    """Return transformers' model of the same family with the same weights."""
    values = transformers.AutoConfig.for_model(**model.config.to_hf())
    options = {"attn_implementation": "eager", "experts_implementation": "eager"} | options
    reference = transformers.AutoModelForCausalLM.from_config(values, **options)
    reference.load_state_dict(model.state_dict())
    return reference.to(next(model.parameters()).dtype)


@pytest.fixture
def float64_reference(monkeypatch):
    """Take the reference's own float32 casts out: norms, rotary tables, routers and softmax stay float64."""

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self, x, position_ids):
        exponents = torch.arange(0, 2 * len(self.inv_freq), 2, dtype=torch.float64) / (2 * len(self.inv_freq))
        theta = self.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None].double() * theta**-exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    softmax = torch.nn.functional.softmax

    def wide_softmax(x, dim, dtype=None):
        return softmax(x, dim=dim)

    narrow = torch.Tensor.type

    def wide_type(self, *dtype):
        return self if self.dtype == torch.float64 else narrow(self, *(dtype or [torch.float32]))

    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        prefix = ARCHITECTURES[family].removesuffix("ForCausalLM")
        monkeypatch.setattr(getattr(module, f"{prefix}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"{prefix}RotaryEmbedding"), "forward", rotary)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide_softmax)
    monkeypatch.setattr(torch.Tensor, "float", wide_type)  # Mixtral's router
    monkeypatch.setattr(torch.Tensor, "type", wide_type)  # GLM's


@pytest.fixture
def tools():
    """Give tests the functions of this file (test modules cannot import one another)."""

    class Tools:
        config, model, reference = staticmethod(make_config), staticmethod(make_model), staticmethod(make_reference)
        tokens = staticmethod(
            lambda *sizes, seed=0: torch.randint(83, sizes, generator=torch.Generator().manual_seed(seed))
        )

        @staticmethod
        def difference(ours, wanted) -> float:
            """Return the largest difference, relative to the largest number."""
            return float((ours - wanted).detach().abs().max() / wanted.detach().abs().max())

    return Tools


def sample() -> list[tuple]:
    """Return (shape, family, whether): every family twice, with True and with False, each time in another shape.

    Every shape meets four families, two of them with True. Shape, family and a third setting are dealt with in three
    places of the code, so all 64 triples would say no more.
    """
    shapes, triples = list(SHAPES), []
    for number, family in enumerate(FAMILIES):
        triples += [(shapes[number % 4], family, True), (shapes[(number + 1 + number // 4) % 4], family, False)]
    return triples


THIRD = {
    "blocks": ("blocks", "torch"),  # attention: our own, which trains on a CPU, or torch's
    "sharded": ("sharded", "one file"),
    "packed": ("packed", "whole rows"),
}


def pytest_generate_tests(metafunc):
    triples, names = sample(), [name for name in ("shape", "family", *THIRD) if name in metafunc.fixturenames]
    if names == ["family"]:
        metafunc.parametrize("family", FAMILIES)
    elif names == ["shape", "family"]:
        metafunc.parametrize(names, [triple[:2] for triple in triples[::2]])
    elif names and names[-1] in THIRD:
        values = [triple[-len(names) :] for triple in triples] if len(names) > 1 else [(True,), (False,)]
        kinds = THIRD[names[-1]]
        metafunc.parametrize(names, values, ids=["-".join([*value[:-1], kinds[not value[-1]]]) for value in values])
