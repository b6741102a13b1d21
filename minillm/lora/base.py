"""Which model an adapter was made for: on another it would answer nonsense, and nothing else would say so.

``base.json``, next to peft's two files, holds a few weights of that model and its name.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from minillm.config.experts_on_disk import stored_scale
from minillm.errors import UserError

BASE = "base.json"


def sample_of(model: nn.Module, names: list[str]) -> list[float]:
    """Return a few weights of up to eight adapted layers, by which the model is known again."""
    values: list[float] = []
    layers = dict(model.named_modules())
    for name in sorted(names)[:: max(1, len(names) // 8)][:8]:
        layer = layers[name]
        adapters = getattr(model, "lora_adapters", None)
        weight = layer.weight if adapters is None else adapters.base.get(f"{name}.weight", layer.weight)
        if "lora" in layer._modules and layer.lora.base_weight is not None:
            weight = layer.lora.base_weight
        flat = weight.detach().reshape(-1) * stored_scale(name, getattr(model, "config", None))
        places = torch.linspace(0, flat.numel() - 1, 8).long()
        values += flat[places.to(flat.device)].float().tolist()
    return values


def same_weights(here: Tensor, there: Tensor) -> bool:
    """Return whether the weights are those of one model, in whatever dtype."""
    # Half precision moves a weight by up to 0.4 %; another training moves many by more.
    return here.shape == there.shape and torch.allclose(here, there, rtol=1e-2, atol=1e-7)


def check_base(model: nn.Module, path: Path, names: list[str]) -> None:
    """Raise UserError where the adapter at ``path`` says that it was made for another model than this one."""
    if not (path / BASE).is_file():
        return  # of peft's
    try:
        said = json.loads((path / BASE).read_text(encoding="utf-8"))
        sample = torch.tensor(said["sample"], dtype=torch.float32)
    except (ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path / BASE} is damaged, copy it again: {error}") from None
    if not same_weights(torch.tensor(sample_of(model, names)), sample):
        now = getattr(model, "origin", None) or "this model"
        base = said.get("base")
        if base and Path(base).resolve() == Path(now).resolve():
            raise UserError(
                f"the adapter {path} was made for {base}, which holds other weights now than it was trained on: give "
                f"the old ones (an earlier run may be in a folder earlier-1 there), or train the adapter again"
            )
        raise UserError(
            f"the adapter {path} was made for {said.get('base') or 'another model'}, whose weights are not those of "
            f"{now}: give that model (--from_weight in eval_model.py; with python -m minillm.lora merge, --model, or "
            f"--any_base if you know that they belong together)"
        )
