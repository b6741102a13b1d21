"""SwiGLU feed-forward layer: one projection gates another.

Shazeer, GLU Variants Improve Transformer (2020), equation 6.
"""

from typing import Any

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.kernels.swiglu import swiglu


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
        """``routing`` is ignored; it is there so that ``MLP`` and ``MoE`` have one signature."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # (B, T, F) inside; (B, T, D)
