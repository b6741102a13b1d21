"""Rotary position embedding: a position turns each pair of a head's numbers by an angle.

Su et al., RoFormer (2021), section 3.2. The dot product of a query at position m and a key at position n then
depends on the positions only through m − n.

Legend: B batch, T positions, H heads, K head width.
"""

import torch
from torch import Tensor


def rope_tables(position_ids: Tensor, *, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every position's angles, each (B, T, 1, K/2), in ``dtype`` (at least float32).

    Pair i turns by position · theta^(−2i/K): the first pairs turn fast and tell near positions apart, the
    last ones slowly and tell far ones apart.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=dtype) / head_dim  # (K/2,)
    angles = position_ids[..., None, None].to(dtype) / theta**exponents  # (B, T, 1, K/2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` (B, T, H, K) turned by the angles of ``rope_tables``, in the dtype of ``x``.

    Number i is paired with number i + K/2 (the layout of Hugging Face's weights; the paper pairs neighbours,
    which is the same up to a permutation of the weights).
    """
    return _Rotation.apply(x, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)  # 2 × (B, T, H, K/2)
    turned = torch.empty_like(x, dtype=cos.dtype)  # (B, T, H, K)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second.to(cos.dtype), sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first.to(cos.dtype), sin)
    return turned.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing but the angles is kept for it."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None
