"""What A and B begin with.

Where B A = 0 at the start (``kaiming``, ``gaussian``) the model begins as it was. ``orthogonal`` begins slightly off
it. ``pissa`` (Meng et al., 2024, section 3) and ``olora`` (Büyükakyüz, 2024, section 3) begin with the directions in
which the weight itself is largest, and take them out of the frozen weight, so that the sum is the old weight.

Legend: R rank.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from minillm.errors import UserError
from minillm.lora.experts import factor_shapes, factor_sizes

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
TAKEN_OUT = ("pissa", "olora")  # of the weight

ORTHOGONAL_GAIN, ORTHOGONAL_STD = 0.01, 0.005


@torch.no_grad()
def first_values(
    layer: nn.Module, *, rank: int, scaling: float, init: Init, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (out, R) for a layer, in at least float32, on its device.

    kaiming: A uniform as torch draws linear layers, B zero. gaussian: A from N(0, 1/R²), B zero. orthogonal: the
    columns of B orthonormal, times 0.01; A from N(0, 0.005²). pissa: the R largest singular triples of W/s, their
    root on either side. olora: the first R columns of Q and rows of R of the QR decomposition of W.

    For an embedding, A (R, V) is zero and B drawn: then rows of ids that never occur stay untouched.

    Raises:
        UserError: ``init`` is unknown, or does not go with this kind of layer.
    """
    if init not in get_args(Init):
        raise UserError(f"init {init!r} is unknown: choose one of {', '.join(get_args(Init))}")
    weight = layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    place = {"device": weight.device, "dtype": dtype}
    if isinstance(layer, nn.Embedding):
        if init not in ("kaiming", "gaussian"):
            raise UserError(f"init {init!r} does not go with an embedding: choose kaiming or gaussian")
        n_ids, width = weight.shape
        b = torch.empty(width, rank, **place).normal_(generator=generator)
        return torch.zeros(rank, n_ids, **place), b
    shapes = factor_shapes(layer, rank, use_dora=False)
    a, b = torch.empty(shapes["A"], **place), torch.zeros(shapes["B"], **place)
    n_out, n_in = factor_sizes(layer)
    if init == "kaiming":
        bound = 1 / math.sqrt(n_in)  # what kaiming_uniform_(a=sqrt(5)) comes to
        return a.uniform_(-bound, bound, generator=generator), b
    if init == "gaussian":
        return a.normal_(std=1 / rank, generator=generator), b
    if weight.ndim > 2:
        raise UserError(f"init {init!r} does not go with experts: choose kaiming or gaussian")
    if rank > min(n_out, n_in):
        raise UserError(f"rank {rank}: init {init!r} needs at most {min(n_out, n_in)} for a layer {n_in} -> {n_out}")
    if init == "orthogonal":
        nn.init.orthogonal_(b, gain=ORTHOGONAL_GAIN, generator=generator)
        return a.normal_(std=ORTHOGONAL_STD, generator=generator), b
    if init == "pissa":
        u, singular, vt = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        root = (singular[:rank] / scaling).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight.to(dtype))
    return r[:rank].contiguous(), q[:, :rank].contiguous()
