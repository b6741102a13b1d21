"""The rotation of RoPE: the plain expression, and one that writes into its result and keeps nothing but the angles.

Legend: B batch, T positions, H heads, K head width, R/2 turned pairs.
"""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` (B, T, H, K) with its pairs (i, i + R/2) turned by angles of cos and sin (B or 1, T, 1, R/2)."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain expression, forward and backward
        return plain(x, cos, sin)
    return _Rotation.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin)


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the same as autograd would have it."""
    half = cos.shape[-1]
    first, second = x[..., :half].to(cos.dtype), x[..., half : 2 * half].to(cos.dtype)  # 2 x (B, T, H, R/2)
    rest = x[..., 2 * half :].to(cos.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]  # 2 x (B, T, H, R/2)
    turned = torch.empty_like(x, dtype=cos.dtype)  # (B, T, H, K)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second.to(cos.dtype), sin, value=-1)
    torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first.to(cos.dtype), sin)
    if 2 * half < x.shape[-1]:
        turned[..., 2 * half :] = x[..., 2 * half :]
    return turned.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the angles is kept for it.

    That holds with an attention factor too: it multiplies the rotation and its transpose alike.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
