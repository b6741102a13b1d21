"""Balanced gradients: where A's and B's gradients differ much in length, the shorter one is enlarged.

With r = ‖∇B‖ / ‖∇A‖: if r > 10, ∇A is multiplied by r/2; if r < 1/10, ∇B by 1/(2r). Afterwards the shorter one is half
as long as the longer one. A gradient of zero has no direction and stays zero, as A's in the first step, while B = 0.

AdamW divides each gradient by its own running length, so a constant factor would change nothing but the norm that is
clipped. What remains are factors that change from step to step.
"""

import torch
from torch import Tensor, nn

from minillm.lora.core import adapted_layers

LARGEST_RATIO = 10.0


@torch.no_grad()
def balance_gradients(model: nn.Module, engine=None, *, largest_ratio: float = LARGEST_RATIO) -> None:
    """Enlarge the shorter gradient of each adapted layer of ``model``; after the last backward pass of a step.

    Args:
        engine: of a run whose gradients are sharded (``minillm.distributed.engine.Engine``); all ranks call together.
    """
    is_sharded = engine is not None and not engine.has_whole_gradients
    for layer in adapted_layers(model).values():
        a, b = layer.lora.A.weight, layer.lora.B.weight
        grad_a, grad_b = (engine.gradient(matrix) if is_sharded else matrix.grad for matrix in (a, b))
        if grad_a is None or grad_b is None:
            continue
        norm_a, norm_b = grad_a.norm(), grad_b.norm()
        for matrix, gradient, factor in (
            (a, grad_a, _factor(norm_a, norm_b, largest_ratio)),
            (b, grad_b, _factor(norm_b, norm_a, largest_ratio)),
        ):
            if is_sharded:
                engine.set_gradient(matrix, gradient * factor)
            else:
                gradient.mul_(factor)


def _factor(norm: Tensor, other: Tensor, largest_ratio: float) -> Tensor:
    """Return what to multiply a gradient of length ``norm`` with; 1 unless the other is much longer."""
    is_short = (norm > 0) & (other > largest_ratio * norm)
    return torch.where(is_short, other / (2 * norm), torch.ones_like(norm))
