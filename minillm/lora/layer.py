"""One adapted layer: its frozen weight plus a trained product of two thin matrices.

Hu et al., LoRA (2021), section 4.1: ``y = W x + s·B A x``, A (R, in), B (out, R). The scaling s is α/R, or α/√R
(Kalajdzievski, rsLoRA, 2023). Liu et al., DoRA (2024), section 4: the rows of ``W + s·B A`` get a trained length of
their own; the present length counts as a constant (section 4.3).

The layer keeps its class and its weight. Its ``forward`` is replaced by ``functools.partial(adapted_forward, layer)``:
the partial holds the layer as data, so ``copy.deepcopy`` and ``pickle`` bind the copy to itself. A closure would not:
written in a loop it sees the last layer only, and a deep copy of it still computes with the original.

Legend: R rank.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.kernels.low_rank_linear import low_rank_linear

NORM_NUMEL = 2**22  # numbers of a weight that DoRA widens at a time


def adapted_forward(layer: nn.Module, *args) -> Tensor:
    """The ``forward`` of an adapted layer: with its adapter, or its class's own while that is off or merged."""
    lora = layer.lora
    if lora.merged or not lora.enabled:
        if lora.initial is None or lora.merged:
            return type(layer).forward(layer, *args)
        return lora.without_training(layer, *args)
    return lora(layer, *args)


def bind(layer: nn.Module, lora: "LoRA") -> None:
    """Give ``layer`` its adapter."""
    layer.lora = lora
    layer.forward = functools.partial(adapted_forward, layer)


def unbind(layer: nn.Module) -> None:
    """Take the adapter away: nothing of it stays in the state dict or the forward pass."""
    del layer.lora, layer.forward


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if "lora" in module._modules}


class LoRA(nn.Module):
    """A (R, in) and B (out, R) of a linear layer, with room for ``rank`` of them.

    They are at least float32 whatever the layer's dtype, also after ``model.half()``: updates of 1e-5 of a weight are
    lost in half precision. Rows that an adapter of lower rank leaves unused are zero, and so are their gradients.

    Attributes:
        enabled: false inside ``disable_lora``. merged: the product is in the layer's weight at the moment.
        scaling: s, a tensor, so that a compiled model takes another adapter without being compiled again.
        initial: A and B at the start, where they were taken out of the weight (PiSSA, OLoRA); else None. They are
            buffers, so that whatever moves the model moves them too.
        base_weight: the layer's own weight, on the CPU, while its place holds another (merged, PiSSA, OLoRA).
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, dropout: float = 0.0, like: Tensor):
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else torch.float32
        place = {"device": like.device, "dtype": dtype}
        self.A = nn.Linear(in_features, rank, bias=False, device="meta")  # draws nothing from torch's generator
        self.B = nn.Linear(rank, out_features, bias=False, device="meta")
        self.A.weight = nn.Parameter(torch.zeros(rank, in_features, **place))
        self.B.weight = nn.Parameter(torch.zeros(out_features, rank, **place))
        self.register_buffer("scaling", torch.ones((), **place), persistent=False)
        self.dropout = dropout
        self.register_buffer("initial_a", None, persistent=False)
        self.register_buffer("initial_b", None, persistent=False)
        self.enabled, self.merged = True, False
        self.base_weight: Tensor | None = None

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """Return (A, B) as they were at the start, or None."""
        return None if self.initial_a is None else (self.initial_a, self.initial_b)

    @initial.setter
    def initial(self, matrices: tuple[Tensor, Tensor] | None) -> None:
        """Keep (A, B), or None."""
        self.initial_a, self.initial_b = matrices or (None, None)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self._product(layer, x, layer.bias)

    def without_training(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The layer as it was before: what was taken out of its weight is added as it was."""
        return low_rank_linear(x, layer.weight, layer.bias, *self.initial, self.scaling)

    def matrices(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B, or what has their shapes, as matrices (..., R, in), (..., out, R)."""
        return a, b

    def delta(self, layer: nn.Module) -> Tensor:
        """Return what the adapter adds to the layer's weight: s·B A (out, in)."""
        return self.scaling * (self.B.weight @ self.A.weight)

    def _product(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return low_rank_linear(x, layer.weight, bias, self.A.weight, self.B.weight, self.scaling, dropout)

    def _apply(self, fn, recurse=True):
        """Stay at least float32 when the model around is cast to half precision."""
        before = {name: parameter.detach() for name, parameter in self.named_parameters()}
        scaling, initial = self.scaling, self.initial
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = before[name].to(parameter.device)
        self.scaling = scaling.to(self.A.weight.device, self.A.weight.dtype)
        if initial is not None:
            self.initial = tuple(tensor.to(self.scaling) for tensor in initial)
        return self

    def extra_repr(self) -> str:
        """Show in ``print(model)`` what the two thin matrices do not."""
        return f"dropout={self.dropout}"


class DoRA(LoRA):
    """LoRA with a trained length for each row of the sum: ``y = (W + s·B A) x · m / ‖W + s·B A‖``."""

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, **options)
        self.magnitude = nn.Parameter(torch.ones_like(self.B.weight[:, 0]))  # (out,)

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        y = self._product(layer, x, None)
        # The factor is close to 1, where bfloat16 has steps of 0.4 %: rounded, it would hide what was learnt.
        y = (y * (self.magnitude / self.row_norms(layer.weight))).to(y.dtype)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)

    def delta(self, layer: nn.Module) -> Tensor:
        """Return the turned and stretched weight less the old one (out, in)."""
        weight = (layer.weight if self.base_weight is None else self.base_weight).to(self.scaling)
        turned = weight + super().delta(layer)
        return (self.magnitude / self.row_norms(weight))[:, None] * turned - weight

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """Return ‖W + s·B A‖ by rows (out,), some rows at a time: the sum is never there as a whole."""
        a, b = self.A.weight, self.B.weight
        n_rows = max(1, NORM_NUMEL // weight.shape[1])
        with torch.autocast(a.device.type, enabled=False):
            parts = zip(weight.split(n_rows), b.split(n_rows), strict=True)
            norms = torch.cat([(part.to(a.dtype) + self.scaling * (low @ a)).norm(dim=1) for part, low in parts])
        # A row of zeros has no direction: not 0/0, but 0 times something
        return norms.clamp_min(torch.finfo(a.dtype).tiny ** 0.5)


class EmbeddingLoRA(LoRA):
    """LoRA of an embedding: column ``id`` of A (R, V) in place of the product with x."""

    def forward(self, layer: nn.Embedding, ids: Tensor) -> Tensor:
        low = F.embedding(ids, self.A.weight.T) * self.scaling  # (..., R)
        return type(layer).forward(layer, ids) + F.linear(low, self.B.weight).to(layer.weight.dtype)

    def delta(self, layer: nn.Module) -> Tensor:
        """Return s·(B A)ᵀ (V, D), as the layer's weight lies."""
        return super().delta(layer).T
