"""Small models to adapt: ours, and transformers' with random weights; peft on the same."""

import copy

import pytest
import torch
import transformers
from torch import nn

from minillm.config import ModelConfig
from minillm.model import Transformer

SHAPE = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40,
}  # fmt: skip
# Each family with what it alone has: Qwen2 biases, Qwen3 norms of queries and keys; and tied weights in one of them.
FAMILIES = {
    "llama": {"tie_word_embeddings": False, "head_dim": 6},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 10},
}
# Every kind of adapter that peft has too: our settings, and peft's for the same.
VARIANTS = {
    "lora": ({}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "attention of one block": (
        {"target_modules": "attention", "layers": (1,)},
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "layers_to_transform": [1]},
    ),
    "regular expression": (
        {"target_modules": r".*\.(up|down)_proj", "use_dora": True},
        {"target_modules": r".*\.(up|down)_proj", "use_dora": True},
    ),
    "patterns": (
        {"rank_pattern": {"down_proj": 7, "layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 2.0}},
        {"rank_pattern": {"down_proj": 7, "layers.0.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 2.0}},
    ),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
    "own biases": (
        {"bias": "lora_only", "target_modules": "q_proj"},
        {"bias": "lora_only", "target_modules": ["q_proj"]},
    ),
    "whole output": ({"modules_to_save": ("lm_head",)}, {"modules_to_save": ["lm_head"]}),
    "embedding": (
        {"target_modules": "embed_tokens,k_proj"},
        {"target_modules": ["embed_tokens", "k_proj"]},
    ),
}  # fmt: skip


def enlarge(model: nn.Module) -> nn.Module:
    """Draw weights large enough that every part of the model matters, norms uneven, biases nonzero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            size = 0.3 if "embed" in name else 0.1  # small rows would be blown up by the first norm, errors too
            parameter.copy_(noise * size if parameter.ndim > 1 else parameter + 0.3 * noise)
    return model


def make_model(*, dtype=torch.float64, **changes) -> Transformer:
    """Return a model of ours with biases."""
    return enlarge(Transformer(ModelConfig(**(SHAPE | {"attention_bias": True} | changes)))).to(dtype)


def make_hf(family: str, *, dtype=torch.float64) -> nn.Module:
    """Return a transformers model that computes in ``dtype`` throughout: its norms round to float32 otherwise."""
    config = transformers.AutoConfig.for_model(family, **(SHAPE | FAMILIES[family] | {"max_position_embeddings": 64}))
    model = enlarge(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
    return exact_norms(model).to(dtype)


def exact_norms(model: nn.Module) -> nn.Module:
    """Put torch's norms into a transformers model, whose own round to float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def make_batch(*, seed: int = 0, vocab_size: int = 37) -> dict[str, torch.Tensor]:
    """Return three rows of 5, 9 and 2 tokens, right-padded, and targets of all but padding and first tokens."""
    ids = torch.randint(1, vocab_size, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(9) < torch.tensor([[5], [9], [2]])
    targets = ids.roll(-1, 1).masked_fill(~mask.roll(-1, 1) | (torch.arange(9) == 8), -100)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "targets": targets}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean loss over targets, of a model of ours or of transformers'."""
    if isinstance(model, Transformer):
        logits = model(batch["input_ids"], document_ids=batch["attention_mask"] - 1)
    else:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def train(model: nn.Module, n_steps: int = 3, *, lr: float = 1e-2, first: int = 0, **options) -> list[float]:
    """Take AdamW steps on everything trainable; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    losses = []
    for step in range(first, first + n_steps):
        optimizer.zero_grad()
        loss = loss_of(model, make_batch(seed=step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits_of(model: nn.Module, seed: int = 0) -> torch.Tensor:
    """Return logits of a batch without padding, in evaluation mode, as far as the mode is concerned."""
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(seed))
    was_training = model.training
    with torch.no_grad():
        logits = model.eval()(ids)
    model.train(was_training)
    return getattr(logits, "logits", logits)


def make_peft(model: nn.Module, variant: str, **settings) -> nn.Module:
    """Return peft's model on a copy of ``model``, its B drawn too, so that A has a gradient from the first step."""
    import peft

    torch.manual_seed(3)
    chosen = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**(chosen | VARIANTS[variant][1] | settings)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
    return adapted.train()


@pytest.fixture
def tools():
    """Give tests the functions of this file (test modules cannot import one another)."""

    class Tools:
        model, hf, peft = staticmethod(make_model), staticmethod(make_hf), staticmethod(make_peft)
        batch, loss, train, logits = map(staticmethod, (make_batch, loss_of, train, logits_of))
        exact_norms = staticmethod(exact_norms)

    return Tools
