"""What a run does for the routers of a mixture of experts: counts over all ranks, the bias, and the numbers to look at.

Legend: L sparse layers, E experts.
"""

import torch
from torch import Tensor, nn

from minillm.distributed.ranks import Ranks
from minillm.model import RouterStats
from minillm.model.moe import Router, update_router_bias
from minillm.model.router_stats import relative_entropy


class Balance:
    """The load of a run's experts; with a dense model every call does nothing.

    A frozen router, as when an adapter is trained, is left as it is: nothing is counted, its bias does not move.

    Once per step ``collect`` adds up over ranks what the micro-batches' ``RouterStats`` counted, in one all-reduce, and
    ``apply`` moves the routers' bias by it. So every rank moves it alike, however the step was cut.

    Attributes:
        stats: to be given to the loss; None for a dense model, or one whose routers are frozen.
    """

    def __init__(self, model: nn.Module, args, ranks: Ranks):
        self.model, self.ranks, self.stats = model, ranks, None
        is_frozen = not any(m.weight.requires_grad for m in model.modules() if isinstance(m, Router))
        if not model.config.num_experts or is_frozen:
            return
        self.speed = args.router_bias_update_speed
        self.coefs = (args.router_aux_loss_coef, args.router_z_loss_coef)
        self.stats = RouterStats(model.config, aux_loss_coef=self.coefs[0], z_loss_coef=self.coefs[1])
        self._step: tuple[Tensor, Tensor] | None = None  # counts (L, E) and sums (3,) of the step, over all ranks
        self._window: tuple[Tensor, Tensor] | None = None  # the same since the last row of metrics

    def collect(self) -> Tensor | float:
        """Close a step; return what the balance and z-losses added to its sum of losses, over all ranks.

        Raises:
            RuntimeError: the loop's loss was not given ``run.router_stats``; nothing would keep the experts busy.
        """
        if self.stats is None:
            return 0.0
        if self.stats.counts is None:
            raise RuntimeError("the routers counted nothing: give run.router_stats to the loss")
        counts, sums = self.stats.counts, self.stats.sums
        total = self.ranks.sum(torch.cat([counts.flatten(), sums]))
        self._step = total[: counts.numel()].view_as(counts), total[counts.numel() :]
        self.stats.reset()
        balance, z = self.coefs
        return balance * self._step[1][0] + z * self._step[1][1]

    def apply(self) -> None:
        """Follow an update that was applied: move the bias, and add the step to the next row of metrics."""
        if self.stats is None:
            return
        counts, sums = self._step
        update_router_bias(self.model, counts, self.speed)
        before = self._window
        self._window = self._step if before is None else (before[0] + counts, before[1] + sums)

    def row(self) -> dict:
        """Return the numbers since the last call, for a row of metrics; empty for a dense model.

        ``balance_loss`` (1 when all experts are equally busy) and ``z_loss``: means over targets and layers, without
        their coefficients. ``expert_share``: (L, E) lists, the share of a layer's choices that fell on each expert.
        ``expert_load_max``: the largest of them times E. ``expert_entropy``: of the shares, mean over layers, in units
        of ln E. ``dropped``: tokens that found no place at their expert; always 0, our experts have no capacity limit.
        """
        if self.stats is None:
            return {}
        row = dict.fromkeys(("balance_loss", "z_loss", "expert_load_max", "expert_entropy", "expert_share"))
        if self._window is not None:  # else every step was skipped
            counts, sums = self._window
            n_layers, n_experts = counts.shape
            balance_sum, z_sum, n_targets = sums.tolist()
            n_terms = max(n_targets, 1.0) * n_layers
            share = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
            row |= {
                "balance_loss": balance_sum / n_terms,
                "z_loss": z_sum / n_terms,
                "expert_load_max": max(map(max, share)) * n_experts,
                "expert_entropy": sum(map(relative_entropy, share)) / n_layers,
                "expert_share": [[round(value, 5) for value in layer] for layer in share],
            }
            self._window = None
        return row | {"dropped": 0}

    def settings(self) -> dict:
        """Return what must match to resume."""
        names = ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_speed")
        return {} if self.stats is None else dict(zip(names, (*self.coefs, self.speed), strict=True))

    def state(self) -> tuple[Tensor, Tensor] | None:
        """Return what a checkpoint needs besides the model, on the CPU: the numbers since the last row of metrics."""
        if self.stats is None or self._window is None:
            return None
        return self._window[0].cpu(), self._window[1].cpu()

    def load_state(self, state: tuple[Tensor, Tensor] | None) -> None:
        """Go on from ``state``."""
        if self.stats is not None:
            device = next(self.model.parameters()).device
            self._window = None if state is None else (state[0].to(device), state[1].to(device))
