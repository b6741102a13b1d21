"""All that training changes in an adapted model, number by number, so that an interrupted run resumes exactly.

``save_lora`` writes what others load; this is for oneself: A and B in the form in which they are trained, also after
PiSSA and OLoRA, whose files for others hold a difference of twice the rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.inject import take_out
from minillm.lora.layer import adapted_layers


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, and what was taken out of the weights at the start; all on the CPU."""
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in adapted_layers(model).items():
        if layer.lora.initial is not None:
            state |= {f"{name}.initial.{key}": tensor for key, tensor in zip("AB", layer.lora.initial, strict=True)}
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


@torch.no_grad()
def load_trained_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Go on from ``state``; ``model`` is the same base with an adapter of the same settings.

    Raises:
        UserError: other settings; the first three names that differ are said.
    """
    here = trained_state(model)
    different = sorted(here.keys() ^ state.keys())
    different += [name for name in here.keys() & state.keys() if here[name].shape != state[name].shape]
    if different:
        raise UserError(f"the checkpoint's adapter has other settings than this run: {', '.join(different[:3])} differ")
    parameters = dict(model.named_parameters())
    for name, tensor in state.items():
        if name in parameters:
            parameters[name].copy_(tensor)
    for name, layer in adapted_layers(model).items():
        lora = layer.lora
        if lora.initial is not None:  # recomputed by another machine they may differ in the last digit
            layer.weight.copy_(lora.base_weight)
            a, b = (state[f"{name}.initial.{key}"].to(lora.scaling) for key in "AB")
            take_out(layer, a, b, float(lora.scaling))
