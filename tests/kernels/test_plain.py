"""Each fast body next to its plain expression: values and gradients in float64."""

import pytest
import torch

from minillm.kernels import (
    chunked_loss,
    linear_cross_entropy,
    linear_log_probs,
    low_rank_linear,
    rms_norm,
    rotation,
    swiglu,
)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


ANGLES = torch.arange(2 * 5 * 3, dtype=torch.float64).view(2, 5, 1, 3)
TARGETS = torch.tensor([3, 0, 2, 5, 1, 1, 4])
WEIGHTS = torch.linspace(0.5, 2, 7, dtype=torch.float64)
ROWS = torch.tensor([0, 2, 3, 6])


def cubes(logits, targets):
    return logits.gather(1, targets[:, None])[:, 0] ** 3


CASES = {
    "linear_cross_entropy": (
        linear_cross_entropy.linear_cross_entropy_sum,
        linear_cross_entropy.plain,
        tensors((7, 5), (6, 5)),
        (TARGETS, WEIGHTS, ROWS),
    ),
    "linear_log_probs": (
        linear_log_probs.target_log_probs,
        linear_log_probs.plain,
        tensors((7, 5), (6, 5)),
        (TARGETS,),
    ),
    "chunked_loss": (
        lambda *args: chunked_loss.chunked_loss(cubes, *args),
        lambda *args: chunked_loss.plain(cubes, *args),
        tensors((7, 5), (6, 5)),
        (TARGETS, WEIGHTS),
    ),
    "rms_norm": (rms_norm.rms_norm, rms_norm.plain, tensors((3, 5, 7), (7,)), (1e-5, torch.float64)),
    "swiglu": (swiglu.swiglu, swiglu.plain, tensors((3, 5, 7), (3, 5, 7)), ()),
    "low_rank_linear": (
        low_rank_linear.low_rank_linear,
        low_rank_linear.plain,
        tensors((3, 5, 7), (6, 7), (6,), (2, 7), (6, 2)),
        (torch.tensor(0.7, dtype=torch.float64),),
    ),
    "rotation": (rotation.rotate, rotation.plain, tensors((2, 5, 4, 6)), (ANGLES.cos(), ANGLES.sin())),
    "rotation of a part": (rotation.rotate, rotation.plain, tensors((2, 5, 4, 9)), (ANGLES.cos(), ANGLES.sin())),
}


@pytest.mark.parametrize("name", CASES)
def test_the_fast_body_is_the_plain_expression(name, monkeypatch):
    for module in (linear_cross_entropy, linear_log_probs, chunked_loss):
        monkeypatch.setattr(module, "CHUNK_NUMEL", 3 * 6)  # chunks of three positions
    fast, plain, inputs, rest = CASES[name]
    ours, wanted = fast(*inputs, *rest), plain(*inputs, *rest)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (ours, wanted))
    for gradient, reference in zip(*gradients, strict=True):
        assert float((gradient - reference).norm() / reference.norm()) <= 1e-12
