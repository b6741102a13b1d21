"""What A and B start with.

Where B A = 0 at the start (``kaiming``, ``gaussian``) the model starts unchanged. ``orthogonal`` starts slightly off
it. ``std`` makes A smaller or larger. ``pissa`` (Meng et al., 2024, section 3) and ``olora`` (Büyükakyüz, 2024, section
3) start with the directions in which the weight itself is largest, and subtract them from the frozen weight, so that
the sum is the old weight.

Legend: R rank.
"""

from typing import Literal, get_args

import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora.core import LoRA
from minillm.lora.more.experts import factor_sizes

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
INITS_WITH_STD = ("gaussian", "orthogonal")  # draw A from a normal distribution
RESIDUAL_INITS = ("pissa", "olora")  # subtracted from the weight

ORTHOGONAL_GAIN, ORTHOGONAL_STD = 0.01, 0.005


@torch.no_grad()
def initialize(
    lora: LoRA,
    layer: nn.Module,
    init: Init,
    *,
    scaling: float,
    std: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Fill A (R, in) and B (out, R) of a new adapter of ``layer``.

    kaiming: A uniform as torch draws linear layers, B zero. gaussian: A from N(0, 1/R²), B zero. orthogonal: the
    columns of B orthonormal, times 0.01; A from N(0, 0.005²). pissa: the R largest singular triples of W/s, their
    root on either side. olora: the first R columns of Q and rows of R of the QR decomposition of W.

    Args:
        std: standard deviation of A for gaussian and orthogonal; 0: the values above. An embedding's A is always zero.

    Raises:
        UserError: ``init`` is unknown, or does not work for this kind of layer.
    """
    if init not in get_args(Init):
        raise UserError(f"init {init!r} is unknown: choose one of {', '.join(get_args(Init))}")
    weight, a, b = layer.weight, lora.A.weight, lora.B.weight
    rank = len(a)
    if isinstance(layer, nn.Embedding) and init not in ("kaiming", "gaussian"):
        raise UserError(f"init {init!r} does not work for an embedding: choose kaiming or gaussian")
    if init == "kaiming" or isinstance(layer, nn.Embedding):
        return lora.initialize(generator)
    if init == "gaussian":
        nn.init.normal_(a, std=std or 1 / rank, generator=generator)
        return None
    if weight.ndim > 2:
        raise UserError(f"init {init!r} does not work for experts: choose kaiming or gaussian")
    n_out, n_in = factor_sizes(layer)
    if rank > min(n_out, n_in):
        raise UserError(f"rank {rank}: init {init!r} needs at most {min(n_out, n_in)} for a layer {n_in} -> {n_out}")
    if init == "orthogonal":
        nn.init.orthogonal_(b, gain=ORTHOGONAL_GAIN, generator=generator)
        nn.init.normal_(a, std=std or ORTHOGONAL_STD, generator=generator)
    elif init == "pissa":
        u, singular, vt = torch.linalg.svd(weight.to(a.dtype), full_matrices=False)
        root = (singular[:rank] / scaling).sqrt()
        a.copy_(root[:, None] * vt[:rank])
        b.copy_(u[:, :rank] * root)
    else:
        q, r = torch.linalg.qr(weight.to(a.dtype))
        a.copy_(r[:rank])
        b.copy_(q[:, :rank])
    return None
