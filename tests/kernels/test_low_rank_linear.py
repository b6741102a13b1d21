"""LoRA's product: its value, its gradients, and what it keeps for them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minillm.kernels.low_rank_linear import low_rank_linear
from minillm.kernels.swiglu import swiglu


def drawn(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(dtype=torch.float64, n_in=11, n_out=7, rank=3):
    """Return x (2, 5, in), W, bias, A, B, s; all but s require a gradient."""
    sizes = ((2, 5, n_in), (n_out, n_in), (n_out,), (rank, n_in), (n_out, rank))
    trained = [drawn(*size, seed=i).to(dtype).requires_grad_() for i, size in enumerate(sizes)]
    return [*trained, torch.tensor(0.7, dtype=dtype)]


def saved_tensors(run):
    """Return what ``run`` returns, and the tensors that it saves for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        return run(), saved


@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_every_gradient_are_those_of_the_formula(with_bias):
    inputs, copies = operands(), operands()
    results = []
    for (x, weight, bias, a, b, s), fast in ((inputs, True), (copies, False)):
        bias = bias if with_bias else None
        y = low_rank_linear(x, weight, bias, a, b, s) if fast else F.linear(x, weight, bias) + s * (x @ a.T @ b.T)
        y.square().sum().backward()
        results.append(y)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    for ours, wanted in zip(inputs[:5], copies[:5], strict=True):
        assert (ours.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=1e-10)


def test_frozen_weight_gets_no_gradient_and_is_not_copied():
    x, weight, _, a, b, s = operands()
    weight.requires_grad_(False)
    y, saved = saved_tensors(lambda: low_rank_linear(x, weight, None, a, b, s))
    y.sum().backward()
    assert weight.grad is None
    inputs = {t.data_ptr() for t in (x, weight, a, b, s)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in inputs) == 10 * 3  # the thin product (N, R) alone


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_input_that_can_be_recomputed_is_not_saved(dropout, recompute):
    """The product of SwiGLU: the layer after it shares the saved gate and up, and the gradients stay the same."""
    gate, up, *more = (drawn(2, 5, 11, seed=i).requires_grad_() for i in (0, 1, 0, 1))
    _, weight, _, a, b, s = operands()
    weight.requires_grad_(False)

    def run(gate, up, product):
        return low_rank_linear(product(gate, up), weight, None, a, b, s, dropout).square().sum()

    torch.manual_seed(0)
    loss, saved = saved_tensors(lambda: run(gate, up, swiglu))
    large = {t.data_ptr() for t in saved if t.shape == gate.shape}
    assert large == {gate.data_ptr(), up.data_ptr()}
    if recompute:
        torch.manual_seed(0)
        loss = checkpoint(run, gate, up, swiglu, use_reentrant=False)
    gradients = torch.autograd.grad(loss, (gate, up, a, b))
    torch.manual_seed(0)
    plain = run(*more, lambda gate, up: F.silu(gate) * up)
    for ours, wanted in zip(gradients, torch.autograd.grad(plain, (*more, a, b)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_dropout_is_drawn_again_in_the_backward_pass():
    """The mask is read off a product with W = 0; with it the gradients must be those of the formula."""
    n_in, p = 64, 0.25
    x, _, _, a, b, s = operands(n_in=n_in)
    eye = torch.eye(n_in, dtype=torch.float64)
    torch.manual_seed(3)
    mask = low_rank_linear(torch.ones_like(x), 0 * eye, None, eye, eye.clone(), torch.ones(()).double(), p).detach()
    assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - p)}
    assert 0.15 < (mask == 0).double().mean() < 0.35
    torch.manual_seed(3)
    low_rank_linear(x, torch.zeros(7, n_in).double(), None, a, b, s, p).square().sum().backward()
    again = operands(n_in=n_in)
    (s * ((again[0] * mask) @ again[3].T @ again[4].T)).square().sum().backward()
    for ours, wanted in ((x, again[0]), (a, again[3]), (b, again[4])):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=1e-9)
        assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.001, 0.4, 0.998, 0.99805, 1 - 1e-9])
def test_any_dropout_below_1_gives_finite_numbers_of_the_right_mean(dropout):
    torch.manual_seed(0)
    weight, a, b = torch.zeros(5, 64), torch.full((2, 64), 0.1), torch.full((5, 2), 0.1)
    x, one = torch.ones(4000, 64), torch.ones(())
    y = low_rank_linear(x.requires_grad_(), weight, None, a, b, one, dropout)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert float(y.detach().mean()) == pytest.approx(64 * 0.1 * 2 * 0.1, rel=0.15)  # 256,000 inputs, 1,000 stay


def test_no_rows_give_no_rows():
    x, weight, bias, a, b, s = operands()
    y = low_rank_linear(x[:0], weight, bias, a, b, s)
    assert y.shape == (0, 5, 7)
    y.sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_narrow_and_parameters_wide(dtype):
    x, weight, bias, a, b, s = operands(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = low_rank_linear(x, weight, bias, a, b, s)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert {a.grad.dtype, b.grad.dtype, x.grad.dtype} == {torch.float32}
    exact = F.linear(x, weight, bias) + s * (x @ a.T @ b.T)
    assert float((y.float() - exact).norm() / exact.norm()) < 1e-2  # eight bits of mantissa
