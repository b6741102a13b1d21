"""Exercises of chapter 10: the gated layer, its width at equal cost, and a gradient that lacks a term."""

import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.kernels.swiglu import swiglu
from tests.exercises.kit import exercise, find_the_bug


def layer(x, gate, up, down, activation=F.silu):
    return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)


def library_layer(x, gate, up, down):
    return F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down)


def added(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) + F.linear(x, up), down)


def silu_of_product(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate) * F.linear(x, up)), down)


@exercise(
    "ch10_swiglu",
    solution=library_layer,
    wrong={
        "sigmoid": (lambda *args: layer(*args, activation=torch.sigmoid), "times its sigmoid"),
        "relu": (lambda *args: layer(*args, activation=F.relu), "negative gate"),
        "exchanged": (lambda x, gate, up, down: layer(x, up, gate, down), "goes through silu"),
        "added": (added, "multiplied"),
        "silu of the product": (silu_of_product, "goes through silu"),
    },
)
def test_feed_forward(candidate):
    one = torch.ones(1, 1)
    assert float(candidate(one, 3 * one, 0 * one, one)) == 0, "gate and up are multiplied: up 0 lets nothing through"
    large = float(candidate(one, 20 * one, 20 * one, one))
    assert abs(large - 400) < 0.01, "silu of a gate of 20 is 20: the number times its sigmoid"
    assert float(candidate(one, one, -30 * one, one)) < -20, "only the gate goes through silu, up keeps its sign"
    assert float(candidate(one, -one, one, one)) < -0.2, "a small negative gate lets a little through: silu(-1) = -0.27"
    torch.manual_seed(0)
    x, gate, up, down = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 5)
    assert torch.allclose(candidate(x, gate, up, down), layer(x, gate, up, down), atol=1e-5), (
        "down is (D, F): it leads from the F hidden units back to D numbers"
    )


@exercise(
    "ch10_width",
    solution=lambda hidden_size, multiple=64: multiple * -(-8 * hidden_size // (3 * multiple)),
    wrong={
        "4 D": (lambda hidden_size, multiple=64: 4 * hidden_size, "three matrices"),
        "down": (lambda hidden_size, multiple=64: multiple * (8 * hidden_size // (3 * multiple)), "at least"),
        "nearest": (lambda hidden_size, multiple=64: multiple * round(8 * hidden_size / 3 / multiple), "at least"),
        "always one more": (
            lambda hidden_size, multiple=64: multiple * (8 * hidden_size // (3 * multiple) + 1),
            "smallest",
        ),
        "not rounded": (lambda hidden_size, multiple=64: -(-8 * hidden_size // 3), "multiple of"),
    },
)
def test_gated_width(candidate):
    for hidden_size in (96, 100, 512, 640, 768, 4096):
        width = candidate(hidden_size)
        assert width < 4 * hidden_size, "three matrices of width 4 D cost half as much again as two"
        assert width % 64 == 0, "the width is a multiple of 64"
        assert 3 * width * hidden_size >= 8 * hidden_size**2, "at least 8 D² parameters: round up"
        assert 3 * (width - 64) * hidden_size < 8 * hidden_size**2, "the smallest such multiple"
        config = ModelConfig(hidden_size=hidden_size, num_attention_heads=2)
        assert width == config.intermediate_size, "the library chooses another width"
    assert candidate(512, multiple=1) == 1366, "multiple is not always 64: with 1 the width is 8 D / 3, rounded up"


def right_gradients(gate, up, grad):
    return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def compare(gradients, gate, up):
    gate, up = torch.tensor(gate, requires_grad=True), torch.tensor(up, requires_grad=True)
    grad = torch.arange(1.0, 1.0 + len(gate))
    expected = torch.autograd.grad(F.silu(gate) * up, (gate, up), grad)
    for name, ours, theirs in zip(("gate", "up"), gradients(gate.detach(), up.detach(), grad), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), f"the gradient of {name} is not autograd's"


def finder(gradients):
    compare(gradients, [-1.5, 0.3, 1.2], [0.7, -2.0, 1.1])


def gate_of_zero(gradients):
    compare(gradients, [0.0, 0.0], [0.7, -2.0])  # the term that is missing is a multiple of the gate


def large_gates(gradients):
    compare(gradients, [40.0, -120.0], [0.7, -2.0])  # sigmoid is flat there


def up_alone(gradients):
    gate, up, grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gradients(gate, up, grad)[1], grad * F.silu(gate)), "the gradient of up is right in both"


test_find_the_bug = find_the_bug(
    "ch10_bug",
    right=right_gradients,
    finder=finder,
    wrong={"gate of zero": gate_of_zero, "large gates": large_gates, "up alone": up_alone},
    hint="it hides in the gradient of up, and where the gate is 0 or far from 0",
)
