"""RMSNorm: the plain expression, and a gradient of few passes over memory for where torch's takes ten.

Legend: N vectors, D numbers each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in at least float32."""
    # On CUDA the plain expression is one kernel, and the compiler makes one of it.
    if x.device.type == "cuda" or torch.compiler.is_compiling():
        return plain(x, weight, eps, out_dtype)
    if not torch.is_grad_enabled():  # nothing is kept; an autograd function would cost as much as the norm of one token
        return _scaled(x, weight, eps, out_dtype)[0]
    return _RMSNorm.apply(x, weight, eps, out_dtype)


def plain(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Return the same by torch's own function."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(out_dtype)


def _scaled(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the same, and the factor r of each vector, (N, 1)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, D)
    mean_square = torch.linalg.vector_norm(flat, dim=-1, keepdim=True).square_().div_(x.shape[-1])  # (N, 1)
    scale = mean_square.add_(eps).rsqrt_()
    return torch.mul(flat, scale).mul_(weight).to(out_dtype).view(x.shape), scale


class _RMSNorm(torch.autograd.Function):
    """The formula and its gradient in few passes over memory: that is what a norm costs.

    With r = 1 / sqrt(mean(x²) + eps) and the upstream gradient g, per vector:

        dx = r·(g·w) − x · r³/D · Σ(g·w·x)        dw = Σ over vectors of g·x·r
    """

    @staticmethod
    def forward(ctx, x, weight, eps, out_dtype):
        normed, scale = _scaled(x, weight, eps, out_dtype)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        dim = x.shape[-1]
        flat = x.reshape(-1, dim).to(scale.dtype)
        grad = grad.reshape(-1, dim).to(scale.dtype)
        wide_weight = weight.to(scale.dtype)
        product = grad * flat  # (N, D); both sums are products of a matrix and a vector
        along = torch.mv(product, wide_weight)[:, None]  # (N, 1): Σ g·w·x
        grad_weight = torch.mv(product.T, scale[:, 0]).to(weight.dtype) if ctx.needs_input_grad[1] else None
        along.mul_(scale.pow(3)).div_(-dim)
        grad_x = torch.mul(grad, wide_weight).mul_(scale).addcmul_(flat, along)
        return grad_x.view(x.shape).to(x.dtype), grad_weight, None, None
