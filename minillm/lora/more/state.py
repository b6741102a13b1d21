"""All that training changes in an adapted model, number by number, so that an interrupted run resumes exactly.

``save_lora`` writes what others load; this is for resuming: A and B in the form in which they are trained, also with
PiSSA and OLoRA, whose adapters for others hold a difference of twice the rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.core import adapted_layers
from minillm.lora.more.layers import ResidualLoRA


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, and what was subtracted from the weights at the start; all on the CPU."""
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, lora in _residual_loras(model).items():
        state |= {f"{name}.initial.{key}": tensor for key, tensor in zip("AB", lora.initial, strict=True)}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Resume from ``state``; ``model`` is the same base with an adapter of the same settings.

    Raises:
        UserError: other settings; the message has the first three names that differ.
    """
    present = trained_state(model)
    different = sorted(present.keys() ^ state.keys())
    different += [name for name in present.keys() & state.keys() if present[name].shape != state[name].shape]
    if different:
        raise UserError(f"the checkpoint's adapter has other settings than this run: {', '.join(different[:3])} differ")
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        if name in parameters:
            parameters[name].copy_(tensor)
    for name, lora in _residual_loras(model).items():  # recomputed on another machine the last digit may differ
        layer = model.get_submodule(name)
        layer.weight.copy_(lora.base_weight)
        lora.subtract_initial(layer, *(state[f"{name}.initial.{key}"].to(lora.scaling) for key in "AB"))


def _residual_loras(model: nn.Module) -> dict[str, ResidualLoRA]:
    loras = {name: layer.lora for name, layer in adapted_layers(model).items()}
    return {name: lora for name, lora in loras.items() if isinstance(lora, ResidualLoRA)}
