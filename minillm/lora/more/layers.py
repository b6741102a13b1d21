"""Variants of the adapted layer: with less memory, DoRA, for PiSSA and OLoRA, for embeddings.

Liu et al., DoRA (2024), section 4: each row of ``W + s·B A`` gets a trained length, its magnitude; the present length
counts as a constant (section 4.3).

Legend: R rank.
"""

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.kernels.low_rank_linear import low_rank_linear
from minillm.lora.core import LoRA

NORM_NUMEL = 2**22  # numbers of a weight that DoRA converts to float32 at a time


class EfficientLoRA(LoRA):
    """LoRA that keeps little more than x for its gradient, and stays in float32 when the model is cast to half.

    It has room for ``rank`` rows of A; rows that an adapter of lower rank leaves unused are zero, and so are their
    gradients.
    """

    def forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self._product(layer, x, layer.bias)

    def _product(self, layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return low_rank_linear(x, layer.weight, bias, self.A.weight, self.B.weight, self.scaling, dropout)

    def _apply(self, fn, recurse=True):
        """Keep at least float32 when the model around is cast to half precision."""
        before = {name: tensor.detach() for name, tensor in self._named_tensors()}
        super()._apply(fn, recurse)
        for name, tensor in self._named_tensors():
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = before[name].to(tensor.device)
        return self

    def _named_tensors(self):
        return chain(self.named_parameters(), self.named_buffers())

    def extra_repr(self) -> str:
        """Show in ``print(model)`` what A and B do not."""
        return f"dropout={self.dropout}"


class DoRA(EfficientLoRA):
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
        """Return m / ‖W + s·B A‖ · (W + s·B A) - W (out, in)."""
        weight = base_weight(layer).to(self.scaling)
        turned = weight + super().delta(layer)
        return (self.magnitude / self.row_norms(weight))[:, None] * turned - weight

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """Return ‖W + s·B A‖ by rows (out,), some rows at a time: the whole sum is never in memory."""
        a, b = self.A.weight, self.B.weight
        n_rows = max(1, NORM_NUMEL // weight.shape[1])
        with torch.autocast(a.device.type, enabled=False):
            parts = zip(weight.split(n_rows), b.split(n_rows), strict=True)
            norms = torch.cat([(part.to(a.dtype) + self.scaling * (low @ a)).norm(dim=1) for part, low in parts])
        # A row of zeros has no direction: not 0/0, but 0 times something
        return norms.clamp_min(torch.finfo(a.dtype).tiny ** 0.5)


class ResidualLoRA(EfficientLoRA):
    """LoRA for PiSSA and OLoRA: the frozen weight holds the residual W - s·B₀A₀, so that the sum starts as W.

    Attributes:
        initial: (A₀, B₀). They are buffers, so that whatever moves the model moves them too.
        base_weight: W itself, from ``subtract_initial`` on.
    """

    def __init__(self, in_features: int, out_features: int, **options):
        super().__init__(in_features, out_features, **options)
        self.register_buffer("initial_a", None, persistent=False)
        self.register_buffer("initial_b", None, persistent=False)

    @property
    def initial(self) -> tuple[Tensor, Tensor]:
        """Return (A₀, B₀)."""
        return self.initial_a, self.initial_b

    @torch.no_grad()
    def subtract_initial(self, layer: nn.Module, a: Tensor, b: Tensor) -> None:
        """Take (A₀, B₀) as the start, and replace the layer's weight W with the residual."""
        self.base_weight = layer.weight.detach().to("cpu", copy=True)
        self.initial_a, self.initial_b = a.clone(), b.clone()
        self._write_residual(layer)

    def base_forward(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Compute W x: unless merged, s·B₀A₀ x is added to what the residual gives."""
        if self.merged:
            return super().base_forward(layer, x)
        return low_rank_linear(x, layer.weight, layer.bias, *self.initial, self.scaling)

    def unmerge(self, layer: nn.Module) -> None:
        """Put the residual back."""
        layer.weight.copy_(self.base_weight)
        self._write_residual(layer)
        self.merged = False

    def _write_residual(self, layer: nn.Module) -> None:
        a, b = self.initial
        layer.weight.copy_(layer.weight.to(a.dtype) - self.scaling * (b @ a))


class EmbeddingLoRA(EfficientLoRA):
    """LoRA of an embedding: column ``id`` of A (R, V) instead of the product with x."""

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw B; A stays zero, so that rows of ids that never occur stay unchanged."""
        nn.init.normal_(self.B.weight, generator=generator)

    def forward(self, layer: nn.Embedding, ids: Tensor) -> Tensor:
        low = F.embedding(ids, self.A.weight.T) * self.scaling  # (..., R)
        return self.base_forward(layer, ids) + F.linear(low, self.B.weight).to(layer.weight.dtype)

    def delta(self, layer: nn.Module) -> Tensor:
        """Return s·(B A)ᵀ (V, D), in the layout of the layer's weight."""
        return super().delta(layer).T


def base_weight(layer: nn.Module) -> Tensor:
    """Return W of an adapted layer, also while its weight holds W + s·B A or a residual."""
    return layer.weight if layer.lora.base_weight is None else layer.lora.base_weight
