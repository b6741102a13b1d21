"""Adapters of fused experts, and which kinds of layers can be adapted at all.

A fused parameter (E, O, I) gets thin matrices for each of its experts, kept as A (R, E, in) and B (out, R, E): with
the rank where other adapters have it, so that they are switched, mixed and stored alike. A row is multiplied by the two
thin matrices of its own expert; their product, as large as all experts, is never formed.

Legend: n sorted rows, R rank, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.kernels.low_rank_linear import times
from minillm.lora.core import LoRA
from minillm.lora.more.layers import DoRA, EfficientLoRA, EmbeddingLoRA, ResidualLoRA
from minillm.model.moe import ExpertProduct, expert_product

ADAPTABLE = (nn.Linear, nn.Embedding, ExpertProduct)
EXPERT_PRODUCTS = ("gate_up", "down")  # of the fused parameters gate_up_proj and down_proj, in their order


class ExpertLoRA(EfficientLoRA):
    """LoRA of each expert of a fused parameter."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, like: Tensor, **options):
        super().__init__(1, 1, rank=1, like=like, **options)
        factory, n_experts = {"dtype": self.scaling.dtype, "device": like.device}, like.shape[0]
        self.A.weight = nn.Parameter(torch.zeros(rank, n_experts, in_features, **factory))
        self.B.weight = nn.Parameter(torch.zeros(out_features, rank, n_experts, **factory))

    def forward(self, layer: ExpertProduct, x: Tensor, ends: Tensor) -> Tensor:
        a, b = self.by_expert(self.A.weight, self.B.weight)
        dropped = F.dropout(x, self.dropout, self.training)
        low = times(expert_product(dropped, a.contiguous(), ends), self.scaling)  # (n, R)
        return self.base_forward(layer, x, ends) + expert_product(low, b.contiguous(), ends)

    @staticmethod
    def by_expert(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and B, or tensors of their shapes, as matrices by expert: (E, R, in), (E, out, R)."""
        return a.transpose(0, 1), b.permute(2, 0, 1)

    def delta(self, layer: nn.Module) -> Tensor:
        """Return what the adapter adds to the parameter: (E, O, I)."""
        a, b = self.by_expert(self.A.weight, self.B.weight)
        return self.scaling * (b @ a)


def check_layer_kinds(layers, names, config) -> None:
    """Raise UserError where DoRA is not available for the kind of a layer."""
    for name in names if config.use_dora else ():
        if isinstance(layers[name], nn.Embedding | ExpertProduct):
            kind = "an embedding" if isinstance(layers[name], nn.Embedding) else "a set of experts"
            raise UserError(f"use_dora: {name} is {kind}, for which there is no DoRA here; leave it out")


def new_slot(
    layer: nn.Module, *, rank: int, dropout: float, use_dora: bool = False, has_residual: bool = False
) -> LoRA:
    """Return an adapter of zeros for a layer, of the class that its kind and the variant need."""
    n_out, n_in = factor_sizes(layer)
    if isinstance(layer, nn.Embedding):
        cls = EmbeddingLoRA
    elif isinstance(layer, ExpertProduct):
        cls = ExpertLoRA
    else:
        cls = DoRA if use_dora else ResidualLoRA if has_residual else EfficientLoRA
    return cls(n_in, n_out, rank=rank, dropout=dropout, like=layer.weight)


def factor_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in): the other sizes of B and A than the rank."""
    n_out, n_in = layer.weight.shape[-2:]
    return (n_in, n_out) if isinstance(layer, nn.Embedding) else (n_out, n_in)


def factor_shapes(layer: nn.Module, rank: int, *, use_dora: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what an adapter of ``rank`` has for a layer, by name."""
    n_out, n_in = factor_sizes(layer)
    if isinstance(layer, ExpertProduct):
        n_experts = layer.weight.shape[0]
        return {"A": (rank, n_experts, n_in), "B": (n_out, rank, n_experts)}
    return {"A": (rank, n_in), "B": (n_out, rank)} | ({"magnitude": (n_out,)} if use_dora else {})
