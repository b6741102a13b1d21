"""RMSNorm against its formula."""

import pytest
import torch

from minillm.model.norm import RMSNorm


def formula(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("sizes", [(5,), (3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_formula(sizes, dtype, bound):
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(5, 1e-3).to(dtype)
    norm.weight.data = torch.randn(5, generator=generator).to(dtype)
    x = torch.randn(sizes, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(sizes, generator=generator).to(dtype)
    ours, wanted = norm(x), formula(x, norm.weight, 1e-3)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, wanted, rtol=0, atol=10 * bound)
    ours = torch.autograd.grad(ours, (x, norm.weight), upstream)
    wanted = torch.autograd.grad(wanted, (x, norm.weight), upstream)
    for gradient, reference in zip(ours, wanted, strict=True):
        assert ((gradient - reference).norm() / reference.norm()).item() < bound


def test_gradcheck():
    norm = RMSNorm(4, 1e-2).double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def call(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(call, (x, norm.weight))


def test_zero_vector_is_finite():
    x = torch.zeros(2, 4, requires_grad=True)
    out = RMSNorm(4, 1e-5)(x)
    out.sum().backward()
    assert (out == 0).all()
    assert torch.isfinite(x.grad).all()


def test_short_dtypes_are_computed_in_float32():
    """In bfloat16 the square of 300 is rounded to 8 bits and the sum of 4,096 squares stops growing."""
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    norm = RMSNorm(4096, 1e-5).to(torch.bfloat16)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert (out == 1).all()
    x = torch.full((1, 64), 3e4, dtype=torch.float16)  # its square overflows float16
    assert (RMSNorm(64, 1e-5).half()(x) == 1).all()


def test_float32_weights_under_bfloat16_autocast():
    """What comes out may be short, since a matrix product follows; it is the float32 result, rounded once."""
    norm = RMSNorm(16, 1e-5)
    norm.weight.data = torch.linspace(0.5, 2, 16)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert torch.equal(out.bfloat16(), formula(x, norm.weight, 1e-5).bfloat16())


def test_a_frozen_weight_gets_no_gradient():
    norm = RMSNorm(6, 1e-5).double().requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    norm(x).pow(3).sum().backward()
    (wanted,) = torch.autograd.grad(formula(x, norm.weight, 1e-5).pow(3).sum(), x)
    assert (x.grad - wanted).norm() <= 1e-12 * wanted.norm()
    assert norm.weight.grad is None
