"""LoRA's product ``W x + s·B A x``: the plain expression, and one that keeps little more than x for its gradient.

Legend: N positions, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``x Wᵀ + bias + s·drop(x) Aᵀ Bᵀ`` for x (..., in).

    Dropout acts on the input of A alone. Its mask is drawn again in the backward pass, from a seed taken from torch's
    generator: kept are x, which the layers that share it keep once, and the thin product (N, R).
    """
    if torch.compiler.is_compiling():  # the compiler fuses, and draws masks again, by itself
        return plain(x, weight, bias, a, b, scaling, dropout)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _LowRankLinear.apply(x, weight, bias, a, b, scaling, dropout, seed)


def plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: Tensor, dropout: float = 0.0
) -> Tensor:
    """Return the same as autograd would have it, which keeps the dropped input and a mask too."""
    low = F.linear(F.linear(F.dropout(x, dropout), a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, weight, bias) + times(low, scaling)


class _LowRankLinear(torch.autograd.Function):
    """The products and gradients behind ``low_rank_linear``.

    The thin product lies as (R, N): every product with it then has its long side along memory, without which dB is
    several times slower in float32. An input whose maker can make it again (``output_again``, as of ``swiglu``) is not
    kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling, dropout, seed):
        dtype = _product_dtype(x)
        ctx.dtype, ctx.dropout, ctx.seed = dtype, dropout, seed
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
            seen = rows * _mask(rows, dropout, seed) if dropout else rows
            low = times(a.to(dtype) @ seen.T, _share(scaling, dropout))  # (R, N)
            y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # (N, out)
            y.addmm_(low.T, b.to(dtype).T)
        ctx.maker = x.grad_fn if hasattr(x.grad_fn, "output_again") else None
        ctx.save_for_backward(x if ctx.maker is None else None, weight, a, b, scaling, low)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """With G of y (N, out) and H = s·A drop(x)ᵀ: dB = (H G)ᵀ, dA = s·Bᵀ Gᵀ drop(x), dx = G W + mask·s·G B A."""
        x, weight, a, b, scaling, low = ctx.saved_tensors
        x = ctx.maker.output_again(ctx.maker) if x is None else x
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dtype, dropout = ctx.dtype, ctx.dropout
        with torch.autocast(x.device.type, enabled=False):
            grad = grad.reshape(-1, grad.shape[-1]).to(dtype)  # (N, out)
            grad_low = times(b.to(dtype).T @ grad.T, _share(scaling, dropout))  # (R, N)
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (N, in)
            mask = _mask(rows, dropout, ctx.seed) if dropout and (need_a or need_x) else None
            grad_x = grad_weight = grad_bias = grad_a = grad_b = None
            if need_b:
                grad_b = (low @ grad).T.to(b.dtype, memory_format=torch.contiguous_format)  # (out, R)
            if need_a:
                grad_a = (grad_low @ (rows if mask is None else rows * mask)).to(a.dtype)  # (R, in)
            if need_x:
                grad_x = grad @ weight.to(dtype)  # (N, in)
                if mask is None:
                    grad_x.addmm_(grad_low.T, a.to(dtype))
                else:
                    grad_x.addcmul_(grad_low.T @ a.to(dtype), mask)
                grad_x = grad_x.view(x.shape).to(x.dtype)
            if need_weight:
                grad_weight = (grad.T @ rows).to(weight.dtype)
            if need_bias:
                grad_bias = grad.sum(dim=0)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the products: autocast does not look into a Function, so this chooses as it would."""
    device = x.device.type
    wanted = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if wanted else x.dtype


def times(low: Tensor, factor: Tensor) -> Tensor:
    """Return ``low`` times a number, in the dtype of ``low``; the number itself is not rounded to it."""
    return (low.to(torch.promote_types(low.dtype, factor.dtype)) * factor).to(low.dtype)


def _share(scaling: Tensor, dropout: float) -> Tensor:
    """Return s, times what dropout's survivors are worth: the mask itself is then nothing but zeros and ones."""
    return scaling / (1 - _dropped_lanes(dropout) / 256)


def _dropped_lanes(dropout: float) -> int:
    """Return how many of a byte's 256 values mean zero: from 1 to 255 where there is dropout at all."""
    return min(max(1, round(256 * dropout)), 255) if dropout else 0


def _mask(rows: Tensor, dropout: float, seed: int) -> Tensor:
    """Return (N, in) zeros and ones, in the dtype of ``rows``; the same seed on the same device gives the same mask.

    One random number makes eight entries, a byte for each, which on a CPU takes a fifth of the time of drawing them one
    by one. So the probability is a multiple of 1/256, and what remains is scaled by exactly that.
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    numbers = torch.empty(-(-rows.numel() // 8), dtype=torch.int64, device=rows.device)
    lanes = numbers.random_(-(2**63), None, generator=generator).view(torch.int8)[: rows.numel()]
    mask = rows.new_empty(rows.numel())
    return torch.ge(lanes, _dropped_lanes(dropout) - 128, out=mask).view(rows.shape)
