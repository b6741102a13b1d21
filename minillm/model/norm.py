"""RMSNorm: scale each vector to a mean square of one.

Zhang & Sennrich, Root Mean Square Layer Normalization (2019), equation 4.
"""

import torch
from torch import Tensor, nn

from minillm.kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in at least float32.

    Under autocast the result has autocast's dtype: a matrix product follows every norm and would round it anyway,
    once per product. Otherwise it has the dtype of ``x``.

    Args:
        dim: size of the last dimension. eps: added to the mean square; keeps a zero vector finite.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        out_dtype = torch.get_autocast_dtype(device) if autocast and x.dtype == torch.float32 else x.dtype
        return rms_norm(x, self.weight, self.eps, out_dtype)
