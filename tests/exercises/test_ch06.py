"""Exercises of chapter 6: RMSNorm, its gradient, and a norm that sees other positions."""

import torch
import torch.nn.functional as F

from minillm.kernels import rms_norm as kernel
from tests.exercises.kit import exercise, find_the_bug


def library_norm(x, weight, eps):
    return kernel.rms_norm(x, weight, eps, x.dtype)


def in_its_own_dtype(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(x.dtype)


@exercise(
    "ch06_norm",
    solution=library_norm,
    wrong={
        "overflows": (in_its_own_dtype, "float32"),
        "subtracts the mean": (lambda x, w, eps: F.layer_norm(x, w.shape, w.to(x.dtype), None, eps), "the mean"),
        "sum for mean": (lambda x, w, eps: x / (x.square().sum(-1, keepdim=True) + eps).sqrt() * w, "sqrt.D."),
        "without eps": (lambda x, w, eps: x / x.square().mean(-1, keepdim=True).sqrt() * w, "zeros"),
        "eps outside the root": (lambda x, w, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w, "under"),
        "float32 comes back": (lambda x, w, eps: library_norm(x.float(), w, eps), "dtype"),
    },
)
def test_rms_norm(candidate):
    one = torch.ones(4)
    found = candidate(torch.full((1, 4), 3.0), one, 1e-6)
    assert found.abs().max() > 0.01, "the mean is not subtracted: equal numbers become 1, not 0"
    assert torch.allclose(found, one, atol=1e-4), "the mean of the squares, not their sum: y has the length sqrt(D)"
    assert not candidate(torch.zeros(1, 4), one, 1e-6).isnan().any(), "zeros give 0, not nan: add eps"
    small = candidate(torch.full((1, 4), 1e-3), one, 1e-6)
    assert torch.allclose(small, one / 2**0.5, atol=1e-4), "eps stands under the root, beside the mean square"
    half = candidate(torch.full((1, 4), 300.0).half(), one, 1e-6)
    assert half.dtype == torch.float16, "the result has the dtype of x"
    assert torch.allclose(half.float(), one, atol=1e-3), "the square of 300 is beyond float16: compute in float32"
    x, weight = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)), torch.arange(5.0)
    expected = F.rms_norm(x, (5,), weight, 1e-5)
    assert torch.allclose(candidate(x, weight, 1e-5), expected, atol=1e-5), "each number is multiplied by its weight"


def library_gradient(x, grad):
    x = x.detach().requires_grad_(True)
    kernel.rms_norm(x, torch.ones(x.shape[1]), 0.0, x.dtype).backward(grad)
    return x.grad


def factor(x):
    return x.square().mean(-1, keepdim=True).rsqrt()


def along(x, grad):
    return (grad * x).mean(-1, keepdim=True) * x * factor(x) ** 3


@exercise(
    "ch06_gradient",
    solution=library_gradient,
    wrong={
        "r is taken as a constant": (lambda x, grad: factor(x) * grad, "right angles"),
        "sum for mean": (lambda x, grad: factor(x) * grad - along(x, grad) * x.shape[1], "right angles"),
        "sign": (lambda x, grad: factor(x) * grad + along(x, grad), "right angles"),
        "no factor r": (lambda x, grad: library_gradient(x, grad) / factor(x), "half as steep"),
    },
)
def test_rms_norm_gradient(candidate):
    draw = torch.Generator().manual_seed(0)
    x, grad = 3 * torch.randn(4, 7, generator=draw), torch.randn(4, 7, generator=draw)
    found = candidate(x, grad)
    assert found.shape == x.shape, "a gradient has the shape of what it belongs to: (N, D)"
    assert (found * x).sum(-1).abs().max() < 1e-4, "stretching x changes nothing: the gradient is at right angles to x"
    expected = library_gradient(x, grad)
    assert torch.allclose(found, expected, atol=1e-5), (
        "at right angles to x, and still wrong: at a vector twice as long the gradient is half as steep"
    )


def right_norm(x):
    return x / x.square().mean(dim=-1, keepdim=True).sqrt()


def finder(norm):
    x = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 3] *= 10
    assert torch.allclose(norm(x)[0, :3], norm(changed)[0, :3]), "a later position must not move earlier ones"


def mean_square_of_all(norm):
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x).square().mean(), torch.tensor(1.0))


def one_position(norm):
    x = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(x).square().mean(-1), torch.ones(2, 1))


def longer_input(norm):
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(norm(10 * x), norm(x), atol=1e-5)


test_find_the_bug = find_the_bug(
    "ch06_bug",
    right=right_norm,
    finder=finder,
    wrong={"mean of all": mean_square_of_all, "one position": one_position, "longer input": longer_input},
    hint="it hides while you look at one position, or at the mean of all",
)
