"""Which model an adapter was made for: with another one it would answer nonsense, and no other check would notice.

``base.json``, next to peft's two files, holds a few weights of that model and its name.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.config.experts_on_disk import stored_scale
from minillm.errors import UserError
from minillm.lora.more.layers import base_weight

BASE = "base.json"


def sample_weights(model: nn.Module, names: list[str]) -> list[float]:
    """Return a few weights of up to eight adapted layers, by which the model is recognized."""
    values: list[float] = []
    layers = dict(model.named_modules())
    for name in sorted(names)[:: max(1, len(names) // 8)][:8]:
        layer = layers[name]
        if "lora" in layer._modules and layer.lora.base_weight is not None:
            weight = base_weight(layer)
        else:  # another adapter may train this layer whole
            adapters = getattr(model, "lora_adapters", None)
            weight = layer.weight if adapters is None else adapters.base.get(f"{name}.weight", layer.weight)
        flat = weight.detach().reshape(-1) * stored_scale(name, getattr(model, "config", None))
        indices = torch.linspace(0, flat.numel() - 1, 8).long()
        values += flat[indices.to(flat.device)].float().tolist()
    return values


def same_weights(weights: Tensor, others: Tensor) -> bool:
    """Return whether the weights are those of one model, in whatever dtype."""
    # Half precision moves a weight by up to 0.4 %; another training moves many by more.
    return weights.shape == others.shape and torch.allclose(weights, others, rtol=1e-2, atol=1e-7)


def check_base(model: nn.Module, path: Path, names: list[str]) -> None:
    """Raise UserError where the adapter at ``path`` was made for another model than this one."""
    if not (path / BASE).is_file():
        return  # written by peft
    try:
        made_for = json.loads((path / BASE).read_text(encoding="utf-8"))
        sample = torch.tensor(made_for["sample"], dtype=torch.float32)
    except (ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path / BASE} is damaged, copy it again: {error}") from None
    if not same_weights(torch.tensor(sample_weights(model, names)), sample):
        present = getattr(model, "origin", None) or "this model"
        base = made_for.get("base")
        if base and Path(base).resolve() == Path(present).resolve():
            raise UserError(
                f"the adapter {path} was made for {base}, whose weights have changed since: use the old weights (an "
                f"earlier run may be in a folder earlier-1 there), or train the adapter again"
            )
        raise UserError(
            f"the adapter {path} was made for {base or 'another model'}, whose weights are not those of {present}: "
            f"use that model (--from_weight in eval_model.py; with python -m minillm.lora merge, --model, or "
            f"--any_base if you know that they belong together)"
        )
