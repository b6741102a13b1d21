"""SwiGLU's product: the plain expression, and one that keeps a tensor less per layer for its gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) · up``, (..., F). For the gradient gate and up are kept, and silu is computed again."""
    if torch.compiler.is_compiling():  # the compiler makes the same choice by itself
        return plain(gate, up)
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def plain(gate: Tensor, up: Tensor) -> Tensor:
    """Return the same as autograd would have it."""
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """The product and its gradient: one tensor less to keep per layer than what autograd would keep.

    A following layer that needs this output in its own backward pass (LoRA on ``down_proj``) need not keep it either:
    ``node.output_again(node)``, with ``node`` the output's ``grad_fn``, computes it again.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.factors, ctx.output_again = None, _output_again
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = _factors(ctx)
        ctx.factors = None
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _output_again(node) -> Tensor:
    gate, up = _factors(node)
    return F.silu(gate).mul_(up)


def _factors(node) -> tuple[Tensor, Tensor]:
    """Return gate and up. They are asked for once: activation checkpointing gives them out a single time."""
    if node.factors is None:
        node.factors = node.saved_tensors
    return node.factors
