"""How many products the losses take, and how their sums are kept."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.kernels.products import product_in_float32, scaled_gradient
from minillm.losses import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_log_probs,
    linear_top_k_distill_loss,
    top_k_teacher,
)

N, D, V, ROWS = 24, 8, 50, 8  # positions, hidden, vocabulary, positions of a chunk
N_CHUNKS = N // ROWS


class Products(TorchDispatchMode):
    """Counts the products of matrices, by the shape of what comes out, and the (V, D) tensors that are made."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple] = []
        self.n_like_weight = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aten = torch.ops.aten  # in inference mode a product arrives whole, as matmul
        if function.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.matmul):
            self.shapes.append(tuple(result.shape))
        elif isinstance(result, torch.Tensor) and tuple(result.shape) == (V, D):
            self.n_like_weight += function.overloadpacket in (torch.ops.aten.zeros_like, torch.ops.aten.empty_like)
        return result


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for name in ("linear_cross_entropy", "linear_log_probs", "chunked_loss"):
        monkeypatch.setattr(importlib.import_module(f"minillm.kernels.{name}"), "CHUNK_NUMEL", ROWS * V)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=dtype) for n in (N, V))
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def cross_entropy_of(hidden, weight, targets):
    return linear_cross_entropy(hidden, weight, targets)[0]


def log_probs_of(hidden, weight, targets):
    return linear_log_probs(hidden[None], weight, targets[None]).sum()


def distilled(hidden, weight, targets):
    theirs = hidden.detach() @ weight.detach().T
    return linear_distill_loss(hidden, weight, theirs.roll(1, 0), None, targets, alpha=0.3)[0]


def distilled_by_best(hidden, weight, targets):
    with torch.no_grad():
        best = top_k_teacher(hidden.detach() @ weight.detach().T, None, targets, k=5)
    return linear_top_k_distill_loss(hidden, weight, *best, targets, alpha=0.3)[0]


LOSSES = [cross_entropy_of, log_probs_of, distilled, distilled_by_best]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_value_alone_takes_one_product_per_chunk(loss, context):
    """A parameter asks for its gradient also where there is none to be had: under no_grad, in validation."""
    hidden, weight, targets = tensors()
    weight = torch.nn.Parameter(weight)
    expected = loss(hidden.requires_grad_(), weight, targets).item()
    with context(), Products() as products:
        value = loss(hidden, weight, targets)
    logits = [shape for shape in products.shapes if shape == (ROWS, V)]
    assert len(logits) == N_CHUNKS
    assert [shape for shape in products.shapes if shape not in ((ROWS, V), (N, V))] == []  # (N, V): the teacher's
    assert products.n_like_weight == 0
    assert value.item() == expected


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "none"])
def test_what_is_frozen_costs_no_product(loss, frozen):
    hidden, weight, targets = tensors()
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    with Products() as products:
        value = loss(hidden, weight, targets)
        if frozen != "both":
            value.backward()
    assert products.shapes.count((ROWS, D)) == (N_CHUNKS if hidden.requires_grad else 0)
    assert products.shapes.count((V, D)) == (N_CHUNKS if weight.requires_grad else 0)
    assert value.requires_grad == (frozen != "both")


@pytest.mark.parametrize("loss", [log_probs_of, distilled])
def test_logits_of_bfloat16_operands_are_not_rounded(loss, monkeypatch):
    """Against float64 products of the same rounded operands: 1e-5 where a bfloat16 logit would be off by 0.06."""
    hidden, weight, targets = tensors()
    hidden, weight = (4 * t for t in (hidden, weight))  # logits of about 45
    softmaxes, log_softmax = [], F.log_softmax
    monkeypatch.setattr(F, "log_softmax", lambda x, dim: softmaxes.append(x.detach()) or log_softmax(x, dim=dim))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(hidden, weight, targets)
    exact = hidden.bfloat16().double() @ weight.bfloat16().double().T
    ours = torch.cat([logits for logits in softmaxes if logits.shape == (ROWS, V)])  # distillation: the teacher's too
    nearest = torch.stack([(ours - row).abs().amax(dim=1).min() for row in exact])
    assert nearest.max() < 1e-4
    assert (exact.bfloat16() - exact).abs().max() > 0.05


def test_log_ratios_below_a_bfloat16_step_are_seen():
    """The gradient of a preference: one entry of the output weight, 1e-3 higher, is 1e-3 · h more of a logit."""
    hidden = torch.full((1, 1, 4), 4.0)
    weight = torch.stack([torch.full((4,), 1.0), torch.full((4,), 0.5)])
    moved = weight.clone()
    moved[0, 0] += 2**-7  # the next bfloat16
    targets = torch.zeros(1, 1, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_log_probs(hidden, moved, targets) - linear_log_probs(hidden, weight, targets)
    exact = [F.log_softmax(hidden.double() @ w.double().T, dim=-1)[..., 0] for w in (moved, weight)]
    assert ours.item() == pytest.approx((exact[0] - exact[1]).item(), rel=1e-2)


@pytest.mark.parametrize("loss", [cross_entropy_of, distilled])
def test_float16_gradients_stay_finite_and_right(loss):
    """Sums over many positions of one frequent token are larger than float16 holds: 30,000 · 3."""
    n, n_tokens = 30_000, 16
    hidden = torch.full((n, 2), 3.0)
    weight = torch.zeros(n_tokens, 2)
    targets = torch.zeros(n, dtype=torch.long)
    gradients = {}
    for dtype in (torch.float16, torch.float64):
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        if loss is cross_entropy_of:
            loss_sum, n_targets = linear_cross_entropy(*inputs, targets)
        else:
            teacher = torch.zeros(n, n_tokens, dtype=dtype)
            teacher[:, 0] = 9
            loss_sum, n_targets = linear_distill_loss(*inputs, teacher, None, targets)
        # Scale times ranks over targets: 70,000 alone is more than float16 holds.
        factor = torch.tensor(70_000.0) / n_targets.float()
        gradients[dtype] = [g.double() for g in torch.autograd.grad(loss_sum * factor, inputs)]
    for ours, exact in zip(gradients[torch.float16], gradients[torch.float64], strict=True):
        representable = exact.abs() < 65_504
        assert torch.isfinite(ours[representable]).all()
        assert torch.allclose(ours[representable], exact[representable], rtol=2e-3)  # float16 has 11 bits


def test_a_loss_scale_that_float16_cannot_hold_is_multiplied_in_float32():
    gradient = torch.full((3,), 0.25, dtype=torch.float16)
    assert scaled_gradient(gradient, torch.tensor(70_000.0), torch.float16).tolist() == [17504.0] * 3
    rounded = scaled_gradient(torch.ones(1, dtype=torch.bfloat16), torch.tensor(1 / 3), torch.float32)
    assert rounded.item() == pytest.approx(1 / 3, rel=1e-6)
    assert scaled_gradient(None, torch.tensor(1.0), torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_in_float32_is_that_of_its_operands(dtype):
    a, b = (torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    product = product_in_float32(a, b.T)
    assert product.dtype == torch.float32
    assert torch.allclose(product.double(), a.double() @ b.double().T, atol=1e-4)
    wide = torch.randn(3, 3, dtype=torch.float64)
    assert torch.equal(product_in_float32(wide, wide), wide @ wide)


@pytest.mark.parametrize("loss", [cross_entropy_of, distilled, distilled_by_best])
@pytest.mark.parametrize("dtype, waits_in", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_the_gradient_of_a_short_output_weight_waits_no_wider_than_it_must(loss, dtype, waits_in):
    hidden, weight, targets = tensors()
    hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    value = loss(hidden, weight, targets)
    (waiting,) = {tensor.dtype for tensor in value.grad_fn.saved_tensors if tensor.shape == (V, D)}
    assert waiting == waits_in
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    loss(exact_hidden, exact_weight, targets).backward()
    value.backward()
    assert weight.grad.dtype == dtype
    bound = 2 * torch.finfo(dtype).eps  # the gradient is rounded, and so are the logits of the teacher
    assert (weight.grad.double() - exact_weight.grad).norm() <= bound * exact_weight.grad.norm()
