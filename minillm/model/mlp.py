"""SwiGLU feed-forward layer: one projection gates another.

Shazeer, GLU Variants Improve Transformer (2020), equation 6.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minillm.config import ModelConfig


class MLP(nn.Module):
    """Return ``down(silu(gate(x)) · up(x))``: (B, T, D) → (B, T, D) through F numbers per position.

    Args:
        width: F; default: the configuration's ``intermediate_size``.
    """

    def __init__(self, config: ModelConfig, width: int | None = None):
        super().__init__()
        width = width or config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, routing: Any = None) -> Tensor:
        """``routing`` is what a mixture of experts takes in this place; one layer for all has nothing to choose."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (B, T, F) inside; (B, T, D)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) · up``, (..., F). For the gradient gate and up are kept, and silu is computed again."""
    if torch.compiler.is_compiling():  # the compiler makes the same choice by itself
        return F.silu(gate) * up
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """The product and its gradient: one tensor less to keep per layer than what autograd would keep.

    Who needs the product for a gradient of its own, as an adapter of the layer behind does, need not keep it either:
    ``node.output_again(node)`` makes it from what is kept here, where ``node`` is the product's ``grad_fn``.
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
