"""Finds adapters by their names."""

from pathlib import Path

from minillm.errors import UserError
from minillm.hub.names import find_adapter, run_name


def adapter_directory(name: str, *, save_dir: str, config) -> Path:
    """Return the directory of the adapter ``name`` for a model of the shape ``config``."""
    return Path(save_dir) / "lora" / (name + _model_suffix(config))


def find_adapters(model, lora_name: str, *, save_dir: str) -> list[tuple[Path, float]]:
    """Return path and weight of each adapter of ``--lora_name``, for ``merge_adapters``.

    ``lora_name`` is a name, a directory or a ``.pth``, or several with weights: ``cooking:0.7,medical:0.3``.

    Raises:
        UserError: there is no such adapter (the message lists those that exist), or a weight is not a number.
    """
    paths_and_weights = []
    for part in filter(None, map(str.strip, lora_name.split(","))):
        name, colon, weight_text = part.partition(":")
        try:
            weight = float(weight_text) if colon else 1.0
        except ValueError:
            message = f"--lora_name {lora_name}: {weight_text!r} is not a weight; write NAME:0.7,OTHER:0.3"
            raise UserError(message) from None
        path = find_adapter(name, save_dir=save_dir, model_suffix=_model_suffix(model.config))
        paths_and_weights.append((path, weight))
    return paths_and_weights


def _model_suffix(config) -> str:
    return run_name("", hidden_size=config.hidden_size, has_experts=bool(config.num_experts))
