"""RMSNorm: scale each vector to a mean square of one.

Zhang & Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in at least float32.

    Args:
        dim: size of the last dimension. eps: added to the mean square; keeps a zero vector finite.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)
