"""AdamW against one written out by hand, and decay where it belongs."""

import pytest
import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.lora import apply_lora
from minillm.model import Transformer
from minillm.training.optim import adamw


def by_hand(weights, gradients, *, lr, decay, betas, eps):
    """Loshchilov & Hutter (2019), algorithm 2, in float64; ``decay`` per tensor."""
    weights = [weight.double().clone() for weight in weights]
    first = [torch.zeros_like(weight) for weight in weights]
    second = [torch.zeros_like(weight) for weight in weights]
    for step, step_gradients in enumerate(gradients, start=1):
        for index, gradient in enumerate(step_gradients):
            first[index] = betas[0] * first[index] + (1 - betas[0]) * gradient
            second[index] = betas[1] * second[index] + (1 - betas[1]) * gradient**2
            m = first[index] / (1 - betas[0] ** step)
            v = second[index] / (1 - betas[1] ** step)
            weights[index] = weights[index] - lr * (m / (v.sqrt() + eps) + decay[index] * weights[index])
    return weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.cube = nn.Parameter(torch.randn(2, 3, 2, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.scale = nn.Parameter(torch.randn((), dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(4, 4, dtype=torch.float64), requires_grad=False)


def test_seven_steps_equal_the_algorithm_in_float64():
    torch.manual_seed(3)
    model = Small()
    trainable = [model.matrix, model.cube, model.bias, model.scale]
    before = [parameter.detach().clone() for parameter in trainable]
    frozen = model.frozen.clone()
    gradients = [[torch.randn_like(p) * 10.0**-step for p in trainable] for step in range(7)]
    optimizer = adamw(model, learning_rate=3e-2, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    for step_gradients in gradients:
        for parameter, gradient in zip(trainable, step_gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    wanted = by_hand(before, gradients, lr=3e-2, decay=[0.3, 0.3, 0.0, 0.0], betas=(0.8, 0.9), eps=1e-6)
    for parameter, value in zip(trainable, wanted, strict=True):
        assert (parameter - value).norm() / value.norm() <= 1e-12
    assert torch.equal(model.frozen, frozen)


@pytest.mark.parametrize("tied", [True, False])
def test_zero_gradients_decay_matrices_once_and_leave_norms(tied):
    torch.manual_seed(0)
    shape = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Transformer(ModelConfig(**shape, num_key_value_heads=1, tie_word_embeddings=tied, use_qk_norm=True))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.5)
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(owned) == len({id(parameter) for parameter in owned}) == len(before)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        wanted = before[name] * (1 - 0.1 * 0.5) if parameter.ndim >= 2 else before[name]
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-6, atol=0)
        assert ("norm" in name) == (parameter.ndim < 2)  # the rule by dimensions says what its name says
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_one_kind_of_parameter_alone_makes_no_empty_group():
    assert len(adamw(nn.Linear(3, 2, bias=False), learning_rate=1.0).param_groups) == 1
    assert [g["weight_decay"] for g in adamw(nn.LayerNorm(3), learning_rate=1.0).param_groups] == [0.0]


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_loraplus_gives_the_matrix_that_begins_at_zero_another_rate(ratio):
    """Hayou et al. (2024): B of a linear layer; in an embedding's adapter A is the one that begins at zero."""
    config = ModelConfig(vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=2)
    model = Transformer(config)
    apply_lora(model, rank=2, target_modules="embed_tokens,q_proj,down_proj", use_rslora=True)
    optimizer = adamw(model, learning_rate=0.25, weight_decay=0.0, loraplus_ratio=ratio)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(rates) == 2 * 5
    for name, parameter in trained.items():
        began_at_zero = not parameter.any()
        assert name.endswith("A.weight" if "embed" in name else "B.weight") == began_at_zero
        assert rates[id(parameter)] == (0.25 * ratio if began_at_zero else 0.25), name
