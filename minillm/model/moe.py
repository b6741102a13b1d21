"""Mixture of experts: a router sends each token through a few of many feed-forward layers.

Shazeer et al., Outrageously Large Neural Networks (2017), section 2; Fedus et al., Switch Transformer (2021). Softmax
routing as in Mixtral (Jiang et al., 2024, section 2.1) and Qwen3, or with shared experts as in DeepSeekMoE (Dai et al.,
2024, section 3.2) and, with a gate, Qwen1.5-MoE; sigmoid routing with shared experts, groups and a correction bias as
in DeepSeek-V3 (2024, section 2.1.2) and GLM-4.5. What balances the load: ``router_stats.py``.

Tokens are sorted by expert, so that each expert multiplies one contiguous block. Padding is sorted behind the last
block and meets no expert.

Legend: B batch, T positions, N = B·T, D hidden, E experts, k experts per token, n = N·k, F feed-forward width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, but the compiler is imported with the first call
from torch.autograd.function import once_differentiable

from minillm.config import ModelConfig
from minillm.kernels.swiglu import swiglu
from minillm.model.mlp import MLP
from minillm.model.router_stats import RouterStats

# All experts in one kernel, block ends read on the device. Absent before torch 2.10 (its private forerunner knew one
# dtype and one architecture).
GROUPED_MM = getattr(F, "grouped_mm", None)
# On a CPU it is the same loop as ours, but without float64 and with demands on the alignment.
GROUPED_DEVICES = ("cuda",)


class Routing(NamedTuple):
    """What the sparse layers of one forward pass need to know about the batch."""

    is_token: Tensor | None = None  # (B, T) bool, false where padding; None: no padding
    stats: RouterStats | None = None


class Router(nn.Module):
    """Chooses k experts per token: (N, D) → logits (N, E), scores (N, E), chosen (N, k), weights (N, k).

    All in at least float32, under autocast too: rounding decides between experts.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_chosen, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.n_groups, self.n_groups_chosen = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.is_sigmoid = config.scoring_func == "sigmoid"
        if self.is_sigmoid:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Keep the correction bias at float32 in a bfloat16 model: its steps of 0.001 would be lost."""
        bias = self._buffers.get("e_score_correction_bias")
        super()._apply(fn, recurse)
        if bias is not None:
            moved = self.e_score_correction_bias
            if moved.dtype not in (torch.float32, torch.float64):
                self.e_score_correction_bias = bias.to(moved.device, torch.float32)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(dtype), self.weight.to(dtype))  # (N, E)
        scores = torch.sigmoid(logits) if self.is_sigmoid else torch.softmax(logits, dim=-1)
        chosen = self._choose(scores.detach())  # (N, k)
        weights = scores.gather(1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return logits, scores, chosen, weights * self.scaling

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the indices (N, k) of the best experts; the bias takes part here only, never in the weights."""
        if self.is_sigmoid:
            scores = scores + self.e_score_correction_bias
        if self.n_groups_chosen < self.n_groups:
            grouped = scores.view(len(scores), self.n_groups, -1)  # (N, groups, E / groups)
            # A group is as good as its two best experts (DeepSeek-V3, section 2.1.2, node-limited routing).
            merit = grouped.topk(2, dim=-1).values.sum(dim=-1)  # (N, groups)
            best = merit.topk(self.n_groups_chosen, dim=-1).indices
            allowed = torch.zeros_like(merit, dtype=torch.bool).scatter_(1, best, True)
            scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)  # (N, E)
        return scores.topk(self.n_chosen, dim=-1).indices


class ExpertProduct(nn.Module):
    """One fused parameter (E, O, I) in use: each row of x (n, I) times the transpose of its expert's weight (n, O).

    It has no parameters of its own; a layer like any other, it can be adapted, hooked and replaced.
    """

    def __init__(self, experts: nn.Module, name: str):
        super().__init__()
        self._home = (experts, name)  # in a tuple, or the parameters would be there twice

    @property
    def weight(self) -> nn.Parameter:
        """The parameter (E, O, I)."""
        experts, name = self._home
        return getattr(experts, name)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return expert_product(x, self.weight, ends)


class Experts(nn.Module):
    """E SwiGLU layers as two fused parameters; each row goes through the one whose block it lies in."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, config.hidden_size))  # gate first
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, width))
        self.gate_up, self.down = (ExpertProduct(self, name) for name in ("gate_up_proj", "down_proj"))

    def forward(self, x: Tensor, ends: Tensor, has_padding: bool) -> Tensor:
        """Return (n, D), zero in the rows of padding.

        Args:
            x: (n, D), sorted by expert, padding last. ends: (E,) int32, the end of each expert's block of rows.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        # The kernel leaves what lies behind the last block uninitialised, in the result and in the gradient. A mask
        # at the entrance and one at the exit keep both from leaking; in between nothing crosses rows.
        has_padding = has_padding and device in GROUPED_DEVICES
        if has_padding:
            is_row = (torch.arange(len(x), device=x.device) < ends[-1])[:, None]  # (n, 1)
            x = torch.where(is_row, x, 0)
        gate, up = self.gate_up(x, ends).chunk(2, dim=-1)  # (n, F)
        out = self.down(swiglu(gate, up), ends)
        return torch.where(is_row, out, 0) if has_padding else out


def expert_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return (n, O): the rows of x (n, I) that end at ends[e] times the transpose of weight[e] (O, I).

    Behind the last block stands zero, or with the grouped kernel anything.
    """
    weight = weight.to(x.dtype)
    # The kernel wants rows of whole 16 bytes: 8 numbers of the shortest dtype.
    can_group = GROUPED_MM is not None and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    if can_group and x.device.type in GROUPED_DEVICES and x.dtype != torch.float64:
        return GROUPED_MM(x, weight.transpose(1, 2), offs=ends)
    return _in_blocks(x, weight, ends)


class MoE(nn.Module):
    """Router, experts and shared experts: (B, T, D) → (B, T, D). Padding gets the shared experts' output alone."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_experts = layer, config.num_experts
        self.gate = Router(config)
        self.experts = Experts(config)
        # Several shared experts are one of their joint width. Its name, and the gate's, are those of the family.
        self.shared_experts = self.shared_expert = self.shared_expert_gate = None
        if config.n_shared_experts:
            shared = MLP(config, config.shared_expert_intermediate_size)
            setattr(self, "shared_expert" if config.model_type == "qwen2_moe" else "shared_experts", shared)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        is_token, stats = routing or Routing()
        n_rows, seq_len, dim = x.shape
        flat = x.reshape(-1, dim)  # (N, D)
        logits, scores, chosen, weights = self.gate(flat)
        if stats is not None:
            self._record(stats, *(t.view(n_rows, seq_len, -1) for t in (logits, scores, chosen)))
        order, inverse, ends = self._sort(chosen, is_token)
        out = self.experts(_Dispatch.apply(flat, order, inverse), ends, is_token is not None)  # (n, D)
        out = _Permute.apply(out, inverse, order).view(*chosen.shape, dim)  # (N, k, D)
        out = (out * weights[..., None]).sum(dim=1).to(out.dtype).view(n_rows, seq_len, dim)  # (B, T, D)
        shared = self._shared(x)
        return out if shared is None else out + shared

    def _shared(self, x: Tensor) -> Tensor | None:
        """Return what the shared experts make of x (B, T, D), times their gate where they have one."""
        shared = self.shared_experts or self.shared_expert
        if shared is None or self.shared_expert_gate is None:
            return None if shared is None else shared(x)
        return torch.sigmoid(self.shared_expert_gate(x)) * shared(x)

    @_disable_dynamo  # the number of a layer must stay out of the compiled code, which all layers share
    def _record(self, stats: RouterStats, logits: Tensor, scores: Tensor, chosen: Tensor) -> None:
        stats.record(self.layer, logits, scores, chosen)

    def _sort(self, chosen: Tensor, is_token: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sorted order (n,) of the flattened choices, its inverse, and where each expert's block ends."""
        if is_token is not None:
            chosen = torch.where(is_token.reshape(-1, 1), chosen, self.n_experts)  # padding: behind the last expert
        experts, order = chosen.flatten().sort(stable=True)  # stable: the order of sums depends on nothing else
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        each = torch.arange(self.n_experts, device=order.device)
        return order, inverse, torch.searchsorted(experts, each, right=True, out_int32=True)


@torch.no_grad()
def update_router_bias(model: nn.Module, counts: Tensor, speed: float) -> None:
    """Make overloaded experts less likely to be chosen, and idle ones more: bias += speed · sign(mean − count).

    Balancing without a loss, whose gradient would disturb the model's: Wang et al., Auxiliary-Loss-Free Load
    Balancing (2024), algorithm 1.

    Args:
        counts: (sparse layers, E), tokens per expert in the whole step, summed over ranks (``RouterStats.counts``).
        speed: step of the bias, in units of the sigmoid's score; 0.001 in DeepSeek-V3.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, count in zip(routers, counts, strict=True):
        if router.is_sigmoid:
            bias = router.e_score_correction_bias
            bias += speed * torch.sign(count.mean() - count).to(bias)


@_disable_dynamo  # the ends of the blocks are other numbers in every batch: each would be compiled again
def _in_blocks(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return _BlockProduct.apply(x, weight, ends.tolist())


class _BlockProduct(torch.autograd.Function):
    """Rows ``ends[e-1]`` to ``ends[e]`` of x (n, I) times the transpose of weight[e] (O, I): (n, O); zero behind."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight)
        ctx.ends = ends
        return _each_block(x, weight.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_weight = None
        if need_weight:
            grad_weight = torch.empty_like(weight)  # each expert's part is written once, in place
            for expert, (start, end) in enumerate(zip([0, *ctx.ends], ctx.ends, strict=False)):
                # An empty block's product is zero: every expert gets a gradient, as DDP expects.
                torch.mm(grad[start:end].T, x[start:end], out=grad_weight[expert])
        return _each_block(grad, weight, ctx.ends) if need_x else None, grad_weight, None


def _each_block(x: Tensor, matrices: Tensor, ends: list[int]) -> Tensor:
    out = x.new_empty(len(x), matrices.shape[2])
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        torch.mm(x[start:end], matrices[expert], out=out[start:end])
    out[ends[-1] :] = 0
    return out


class _Dispatch(torch.autograd.Function):
    """Copy each of N rows to the k places that it was sorted to; gradients are gathered, not scattered (no atomics)."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        ctx.shape = x.shape
        return x.index_select(0, order // (len(order) // len(x)) if len(x) else order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        n_rows, dim = ctx.shape
        return grad.index_select(0, inverse).view(n_rows, -1, dim).sum(dim=1), None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient in the inverse one."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
