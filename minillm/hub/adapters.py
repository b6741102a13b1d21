"""Adapters by the names that people give them."""

from pathlib import Path

from minillm.errors import UserError
from minillm.hub.names import find_adapter, run_name
from minillm.lora.more.merge import merge_adapters


def adapter_directory(name: str, *, save_dir: str, config) -> Path:
    """Return the directory of the adapter ``name`` for a model of the shape ``config``."""
    stage = run_name(name, hidden_size=config.hidden_size, has_experts=bool(config.num_experts))
    return Path(save_dir) / "lora" / stage


def add_adapters(model, said: str, *, save_dir: str) -> list[Path]:
    """Add the adapters that ``--lora_name`` names to the weights of ``model``; return where they were.

    ``said`` is a name, a directory or a ``.pth``, or several with their weights: ``cooking:0.7,medical:0.3``.

    Raises:
        UserError: nothing there (the message lists the adapters there are), or it does not fit the model.
    """
    chosen = []
    for part in filter(None, map(str.strip, said.split(","))):
        name, colon, weight = part.partition(":")
        try:
            share = float(weight) if colon else 1.0
        except ValueError:
            raise UserError(f"--lora_name {said}: {weight!r} is not a weight; write NAME:0.7,OTHER:0.3") from None
        suffix = run_name("", hidden_size=model.config.hidden_size, has_experts=bool(model.config.num_experts))
        chosen.append((find_adapter(name, save_dir=save_dir, model_suffix=suffix), share))
    merge_adapters(model, chosen)  # answers then cost what the model alone costs
    return [path for path, _ in chosen]
