"""Balanced gradients against the obvious formula, one layer and number at a time."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.lora import apply_lora
from minillm.lora.core import adapted_layers
from minillm.lora.more.balance import balance_gradients
from minillm.model import Transformer

CONFIG = ModelConfig(vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    model = Transformer(CONFIG).double()
    apply_lora(model, rank=3, target_modules="q_proj", generator=torch.Generator().manual_seed(1))
    (layer,) = adapted_layers(model).values()
    return layer


def gradients_of_length(layer, length_a, length_b):
    """Give A and B gradients of these lengths; return them."""
    gradients = []
    for matrix, length in ((layer.lora.A.weight, length_a), (layer.lora.B.weight, length_b)):
        gradient = torch.randn_like(matrix)
        matrix.grad = gradient * (length / gradient.norm())
        gradients.append(matrix.grad.clone())
    return gradients


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((0.1, 2.0), (1.0, 2.0)),  # B : A is 20: A's becomes half of B's
        ((30.0, 0.5), (30.0, 15.0)),
        ((0.2, 1.9), (0.2, 1.9)),  # less than ten times: as they are
        ((1.9, 0.2), (1.9, 0.2)),
        ((0.0, 2.0), (0.0, 2.0)),  # no direction
        ((0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_the_shorter_one_becomes_half_as_long_as_the_longer_one(layer, lengths, expected):
    before = gradients_of_length(layer, *lengths)
    balance_gradients(layer)
    after = [layer.lora.A.weight.grad, layer.lora.B.weight.grad]
    assert [gradient.norm().item() for gradient in after] == pytest.approx(expected, rel=1e-12)
    for old, new, length in zip(before, after, expected, strict=True):
        torch.testing.assert_close(new, old * (length / old.norm()) if length else old, rtol=1e-12, atol=0)


def test_numbers_that_are_not_finite_are_left_for_the_run_to_find(layer):
    gradients_of_length(layer, 1.0, 1.0)
    layer.lora.A.weight.grad[0, 0] = torch.nan
    balance_gradients(layer)
    assert layer.lora.A.weight.grad.isnan().sum() == 1
    assert layer.lora.B.weight.grad.norm().item() == pytest.approx(1.0)


def test_a_frozen_adapter_is_left_alone(layer):
    gradients_of_length(layer, 1.0, 50.0)
    layer.lora.A.weight.grad = None
    balance_gradients(layer)
    assert layer.lora.B.weight.grad.norm().item() == pytest.approx(50.0)


def test_for_adam_a_constant_factor_changes_nothing(layer):
    """Why balancing can do so little: with a fixed factor the updates are the same, up to eps."""
    updates = []
    for factor in (1.0, 1000.0):
        matrix = layer.lora.B.weight.detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([matrix], lr=1e-2, weight_decay=0.0, eps=1e-12)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            matrix.grad = factor * torch.randn(matrix.shape, generator=generator, dtype=matrix.dtype)
            optimizer.step()
        updates.append(matrix.detach())
    torch.testing.assert_close(*updates, rtol=1e-9, atol=0)
