"""AdamW, with weight decay on matrices only.

Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.
"""

import torch
from torch import nn


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of ``model``, as one fused kernel where the device has it.

    Decay pulls weights towards zero. That suits matrices (two dimensions or more, the embedding included);
    for a norm's scale or a bias it would pull the layer's output towards zero, so these are left out.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in trainable)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
