"""Exercises of chapter 18: what a rank can reach, the gradients of A and B, and a merge."""

import pytest
import torch
from torch import nn

from minillm.lora import apply_lora, merge_lora
from tests.exercises.kit import exercise, find_the_bug


def with_singular_values(values, n_out=6, n_in=5):
    u, v = (torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))[0] for n in (n_out, n_in))
    return u @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T


def left_over(change, rank):
    return float(torch.linalg.svdvals(change)[rank:].square().sum())


@exercise(
    "ch18_best_error",
    solution=left_over,
    wrong={
        "what is kept": (lambda c, r: float(torch.linalg.svdvals(c)[:r].square().sum()), "left over"),
        "not squared": (lambda c, r: float(torch.linalg.svdvals(c)[r:].sum()), "squares"),
        "the root": (lambda c, r: left_over(c, r) ** 0.5, "no root"),
        "the first rows": (lambda c, r: float(c[r:].square().sum()), "directions, not rows"),
        "the next one alone": (lambda c, r: float(torch.linalg.svdvals(c)[r] ** 2), "all that are left over"),
    },
)
def test_best_error(candidate):
    torch.manual_seed(0)
    change = with_singular_values([4.0, 3.0, 2.0, 1.0])
    for rank, expected in ((3, 1.0), (2, 5.0), (1, 14.0)):
        error = float(candidate(change, rank))
        kept = 30.0 - expected
        assert error != pytest.approx(kept), "this is what the rank keeps; the error is what is left over"
        assert error == pytest.approx(float(candidate(change.flip(0), rank))), (
            "the order of the rows must not matter: a rank is a number of directions, not rows"
        )
        not_squared = sum(range(1, 5 - rank))
        assert rank == 3 or error != pytest.approx(not_squared), "the error is a sum of squares of singular values"
        assert rank == 3 or error != pytest.approx(expected**0.5), "the error is a sum of squares, and no root of it"
        assert error == pytest.approx(expected), "sum the squares of all that are left over, not of the next one alone"
    assert float(candidate(change, 9)) == pytest.approx(0, abs=1e-9), "a rank above all sizes leaves nothing"


def by_hand(inputs, output_gradient, a, b, alpha):
    scaling = alpha / len(a)
    whole = output_gradient.T @ inputs  # (out, in): what W's gradient would be
    return scaling * b.T @ whole, scaling * whole @ a.T


def unscaled(inputs, output_gradient, a, b, alpha):
    return tuple(gradient / (alpha / len(a)) for gradient in by_hand(inputs, output_gradient, a, b, alpha))


def by_alpha(inputs, output_gradient, a, b, alpha):
    return tuple(gradient * len(a) for gradient in by_hand(inputs, output_gradient, a, b, alpha))


def exchanged(inputs, output_gradient, a, b, alpha):
    return by_hand(inputs, output_gradient, a, b, alpha)[::-1]


def mean_over_rows(inputs, output_gradient, a, b, alpha):
    return tuple(gradient / len(inputs) for gradient in by_hand(inputs, output_gradient, a, b, alpha))


@exercise(
    "ch18_gradients",
    solution=by_hand,
    wrong={
        "without s": (unscaled, "alpha / R"),
        "times alpha": (by_alpha, "divided by the rank"),
        "B first": (exchanged, "A's gradient first"),
        "mean": (mean_over_rows, "sum over the rows"),
    },
)
def test_lora_gradients(candidate):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(5, 7, bias=False))
    apply_lora(layer, rank=3, alpha=12.0)
    lora = layer[0].lora
    nn.init.normal_(lora.B.weight)
    inputs, slope = torch.randn(6, 5), torch.randn(6, 7)
    (layer(inputs) * slope).sum().backward()
    a, b = lora.A.weight.detach(), lora.B.weight.detach()
    gradients = candidate(inputs, slope, a, b, 12.0)
    assert [tuple(g.shape) for g in gradients] == [(3, 5), (7, 3)], (
        "return A's gradient first, then B's, in their shapes"
    )
    for mine, right in zip(gradients, (lora.A.weight.grad, lora.B.weight.grad), strict=True):
        factor = float((mine * right).sum() / right.square().sum())
        assert factor != pytest.approx(1 / 4, abs=1e-3), "the product is scaled by alpha / R, and so are both gradients"
        assert factor != pytest.approx(3, abs=1e-3), "alpha is divided by the rank: s = alpha / R"
        assert factor != pytest.approx(1 / 6, abs=1e-3), "the gradients of a batch are a sum over the rows, not a mean"
        assert torch.allclose(mine, right, rtol=1e-4, atol=1e-4), "autograd finds others: what is W's gradient G here?"


def right_merge(weight, a, b, alpha):
    model = nn.Sequential(nn.Linear(a.shape[1], len(b), bias=False))
    apply_lora(model, rank=len(a), alpha=alpha)
    model.to(weight.dtype)
    with torch.no_grad():
        for parameter, value in ((model[0].weight, weight), (model[0].lora.A.weight, a), (model[0].lora.B.weight, b)):
            parameter.copy_(value)
    return merge_lora(model)[0].weight.detach()


def finder(merged):
    weight, a, b = torch.zeros(6, 5), torch.ones(2, 5), torch.ones(6, 2)
    assert torch.allclose(merged(weight, a, b, 4.0), torch.full((6, 5), 4.0)), "s = 4 / 2, times a product of 2"


def at_the_start(merged):
    weight = torch.randn(6, 5)
    assert torch.equal(merged(weight, torch.randn(2, 5), torch.zeros(6, 2), 4.0), weight), "B = 0 hides it"


def square(merged):
    a, b = torch.ones(4, 4), torch.ones(4, 4)
    assert torch.allclose(merged(torch.zeros(4, 4), a, b, 4.0), b @ a), "as many outputs as ranks hide it"


def doubled(merged):
    weight, a, b = torch.zeros(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    assert torch.allclose(merged(weight, a, b, 8.0), 2 * merged(weight, a, b, 4.0)), "alpha is right"


def unscaled_product(merged):
    weight, a, b = torch.zeros(6, 5), torch.ones(2, 5), torch.ones(6, 2)
    assert torch.allclose(merged(weight, a, b, 4.0), b @ a), "accuses the right one: s is not 1"


test_find_the_bug = find_the_bug(
    "ch18_bug",
    right=right_merge,
    finder=finder,
    hint="it hides while B is 0, and with as many outputs as ranks",
    wrong={
        "at the start": at_the_start,
        "square": square,
        "only alpha": doubled,
        "without s": unscaled_product,
    },
)
