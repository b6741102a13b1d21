"""Weights in eight bits: a quarter of the bytes to read per token, for a CPU that answers one request at a time.

Each row of a matrix has its own scale, so that its largest number becomes ±127 (absmax; Dettmers et al., LLM.int8(),
2022, section 2.1, for rows of weights alone). Activations keep their dtype: the compiled loop of a decode step
(``decode.py``) turns each number back on its way from memory to the multiplication. Steps with several tokens
(prompts, batches) turn back the whole matrix first, which is slower than having it.

Legend: O out, D in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import UserError


class Int8Linear(nn.Module):
    """A linear layer (…, D) → (…, O) whose weight is ``weight · scale``, int8 (O, D) and float32 (O,).

    Every weight is at most half a ``scale`` from its original.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        original = linear.weight.detach().float()
        scale = original.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127  # (O,)
        self.register_buffer("weight", (original / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y = (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias


def to_int8(model: nn.Module) -> None:
    """Replace the projections and the output layer of ``model`` by :class:`Int8Linear`, in place.

    Embeddings, norms, routers and the stacked experts of a mixture stay as they are. A tied output layer gets an int8
    copy of the embedding.

    Raises:
        UserError: the model has an adapter in its layers: merge it first.
    """
    if any("lora" in name.split(".") for name, _ in model.named_modules()):
        raise UserError("the model has a LoRA adapter, which has no int8 form: merge it into the weights first")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and (name.endswith("_proj") or name == "lm_head"):
                setattr(module, name, Int8Linear(child))
