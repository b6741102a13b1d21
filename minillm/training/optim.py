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
        loraplus_ratio: the learning rate of an adapter's B, as a multiple of that of A (see ``fast_parameters``).
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fast_names = fast_parameters(model) if loraplus_ratio != 1 else set()
    slow = [p for name, p in trainable.items() if name not in fast_names]
    fast = [p for name, p in trainable.items() if name in fast_names]
    groups = []
    for parameters, lr in ((slow, learning_rate), (fast, loraplus_ratio * learning_rate)):
        matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": weight_decay, "lr": lr})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr": lr})
    groups = [group for group in groups if group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in trainable.values())
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def fast_parameters(model: nn.Module) -> set[str]:
    """Return the names of the parameters with the larger learning rate of LoRA+ (Hayou et al., 2024, section 4).

    They are those that start at zero: B of every adapter, but A in the adapter of an embedding.
    """
    return {
        f"{name}.lora.{'A' if isinstance(module, nn.Embedding) else 'B'}.weight"
        for name, module in model.named_modules()
        if "lora" in module._modules
    }
