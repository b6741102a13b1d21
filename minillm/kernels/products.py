"""Products with the output weight: in how many chunks, in which dtype, and added up in float32.

A logit of 20 has steps of 0.125 in bfloat16, which is more than a preference or a divergence has to tell apart; and a
sum over 30,000 positions is easily more than float16 can hold (65,504). The multiplier adds in float32 anyway, so what
is saved here is only the rounding of the result.

Legend: N positions, D hidden, V vocabulary.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

MIN_POSITIONS_ON_GPU = 1024


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that autocast would choose for a product with ``hidden``; it does not act in a Function."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, two matrices of one dtype, in at least float32. There is no gradient through it."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a @ b
    if _multiplies_into_float32(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def product_for_sums(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in at least float32, where many such are added up and the rounding of one does not matter.

    So a CPU may multiply bfloat16, several times as fast as float32; float16 is added in float32, or it overflows.
    """
    if a.dtype == torch.bfloat16 and a.device.type == "cpu":
        return (a @ b).float()
    return product_in_float32(a, b)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add ``a @ b`` to ``total`` in place and return it; None begins a sum, in at least float32.

    Where the multiplier can add to float32 numbers as it writes, the product itself never exists.
    """
    if total is None:
        return product_for_sums(a, b)
    if total.dtype == torch.float32 and _adds_into_float32(a.dtype, a.device):
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.add_(product_for_sums(a, b))


def output_operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the output weight (V, D), rounded to ``dtype``, as the other side of several ``product_in_float32``.

    Where these products are taken in float32, it is widened once and not for each of them.
    """
    short = weight.to(dtype)
    return short if _multiplies_into_float32(short) else short.to(torch.promote_types(dtype, torch.float32))


def kept_dtype(operand: Tensor) -> torch.dtype:
    """Return the dtype in which a gradient of ``operand`` is stored until the backward pass.

    It is the operand's own, but float32 for float16: the loss scale comes only in the backward pass, and without it
    small numbers would be lost.
    """
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def scaled_gradient(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return ``gradient · factor`` in ``dtype``; None stays None.

    The factor, a float32 scalar with float16's loss scale in it, may be larger than float16 holds: the product is
    taken in float32 and rounded once.
    """
    if gradient is None:
        return None
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor.to(wide)).to(dtype)


def chunk_len(n_tokens: int, *, numel: int, device_type: str) -> int:
    """Return how many positions have their logits in memory at a time: one rule for all losses.

    A chunk's logits are n·V numbers. On a CPU few positions are best, because the numbers then stay in the cache. A
    GPU wants at least 1,024: each chunk reads the whole output weight (V, D) and adds to the whole of its gradient,
    which for a vocabulary of 150,000 takes longer than the product of a short chunk.

    Args:
        n_tokens: V. numel: logits that a chunk should have at most, where that is enough positions.
    """
    length = max(1, numel // n_tokens)
    return max(length, MIN_POSITIONS_ON_GPU) if device_type == "cuda" else length


def chunks(n_positions: int, n_tokens: int, *, numel: int, device: torch.device) -> Iterator[slice]:
    """Yield the slices that ``n_positions`` are worked on in."""
    length = chunk_len(n_tokens, numel=numel, device_type=device.type)
    return (slice(start, start + length) for start in range(0, n_positions, length))


def _multiplies_into_float32(a: Tensor) -> bool:
    return a.is_cuda and torch.version.hip is None


@functools.cache
def _adds_into_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a product of short numbers can be added to float32 ones. torch 2.8 has the name but refuses."""
    if dtype not in (torch.float16, torch.bfloat16) or device.type != "cuda" or torch.version.hip is not None:
        return False
    a, total = torch.zeros(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
