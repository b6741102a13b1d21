"""Rotary embedding against complex numbers, and the property it exists for."""

import pytest
import torch

from minillm.model.rope import apply_rope, rope_tables


def by_complex_numbers(x, position_ids, theta):
    """Pair i of a head, as the complex number x[i] + i·x[i + K/2], times exp(i · position · theta^(−2i/K))."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])  # (B, T, H, K/2)
    exponents = torch.arange(half, dtype=x.dtype) * 2 / x.shape[-1]
    angles = position_ids[..., None, None] * theta**-exponents
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def rotate(x, position_ids, theta=1e4):
    return apply_rope(x, *rope_tables(position_ids, head_dim=x.shape[-1], theta=theta, dtype=x.dtype))


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("theta", [10.0, 1e4, 1e6])
def test_equals_complex_multiplication(head_dim, theta):
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 5, 3, head_dim, dtype=torch.float64, generator=generator, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 31_000, 1, 2]])  # restarts and long ones
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours, wanted = rotate(x, positions, theta), by_complex_numbers(x, positions, theta)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)
    (ours,), (wanted,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(wanted, x, upstream)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_products_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)

    def product(m, n):
        return (rotate(q, torch.tensor([[m]])) * rotate(k, torch.tensor([[n]]))).sum().item()

    assert product(9, 4) == pytest.approx(product(1009, 1004), abs=1e-9)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_position_zero_changes_nothing_and_lengths_stay():
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, torch.tensor([[0, 5, 100]]))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_gradcheck():
    x = torch.randn(1, 3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, torch.tensor([[0, 2, 9]])), x)


def test_angles_are_at_least_float32():
    """At position 30,000 a bfloat16 angle would be off by whole turns."""
    positions = torch.tensor([[30_001]])
    cos, sin = rope_tables(positions, head_dim=8, theta=1e4, dtype=torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    wide = rope_tables(positions, head_dim=8, theta=1e4, dtype=torch.float64)
    assert wide[0].dtype == torch.float64
    assert (cos - wide[0]).abs().max() < 5e-3  # float32 holds 30,001 rad to 2e-3
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(3))
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
