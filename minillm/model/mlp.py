"""SwiGLU feed-forward layer: one projection gates another.

Shazeer, GLU Variants Improve Transformer (2020), equation 6.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig


class MLP(nn.Module):
    """Return ``down(silu(gate(x)) · up(x))``: (B, T, D) → (B, T, D) through F numbers per position."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, F)
        return self.down_proj(gated)  # (B, T, D)
