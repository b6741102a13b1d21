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
    loraplus_ratio: float = 1.0,
) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of ``model``, as one fused kernel where the device has it.

    Decay pulls weights towards zero. That suits matrices (two dimensions or more, the embedding included);
    for a norm's scale or a bias it would pull the layer's output towards zero, so these are left out.

    Args:
        loraplus_ratio: the learning rate of an adapter's B, as a multiple of that of A (Hayou et al., LoRA+, 2024,
            section 4). In an embedding's adapter it is A that begins at zero, and has the larger rate.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    zero_first = {
        f"{name}.lora.{'A' if isinstance(module, nn.Embedding) else 'B'}.weight"
        for name, module in model.named_modules()
        if "lora" in module._modules
    }
    rates = {False: learning_rate, True: loraplus_ratio * learning_rate}
    groups = []
    for is_fast in (False, True):
        some = [p for name, p in trainable if (loraplus_ratio != 1 and name in zero_first) == is_fast]
        groups += [
            {"params": [p for p in some if p.ndim >= 2], "weight_decay": weight_decay, "lr": rates[is_fast]},
            {"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0, "lr": rates[is_fast]},
        ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for _, p in trainable)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
