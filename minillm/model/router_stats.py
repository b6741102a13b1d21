"""What keeps the experts busy: the balance loss, the z-loss, and the counts of tokens per expert.

Balance loss: Fedus et al., Switch Transformer (2021), section 2.2, per sequence as in DeepSeek-V3 (2024), equations
17 to 20. z-loss: Zoph et al., ST-MoE (2022), equation 5.

Legend: B rows, T positions, E experts, k experts per token.
"""

import math

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import UserError


class RouterStats:
    """Collects, over the sparse layers of one micro-batch, what is to be added to the loss.

    Per row r with T_r tokens (padding left out), f_e = E / (k T_r) · #(tokens that chose e), P_e the mean of
    score_e / Σ scores:

        balance_r = Σ_e f_e P_e        z_r = mean over tokens of logsumexp(logits)²

    A row enters with the number of its targets as its weight. ``loss_sum + finish()``, divided by the number of
    targets of the whole step, is then the same however the rows are spread over micro-batches and ranks.

    ``begin(batch)``, the forward pass, ``finish()``, backward: in this order. A forward pass repeated by activation
    checkpointing comes after ``finish`` and is not counted again.

    Attributes:
        counts: (sparse layers, E) float64 (float32 on mps): tokens that chose each expert since ``reset``; None
            before the first ``finish``.
        sums: (3,), as wide, no gradient, over the same micro-batches: Σ n_targets · balance_r and Σ n_targets · z_r,
            each over rows and layers and without its coefficient, then Σ n_targets; None likewise.

    Raises:
        UserError: top-1 routing with normalised weights. The one weight is 1 whatever the router says.
    """

    def __init__(self, config: ModelConfig, *, aux_loss_coef: float, z_loss_coef: float):
        if config.num_experts_per_tok == 1 and config.norm_topk_prob:
            raise UserError(
                "num_experts_per_tok is 1 and norm_topk_prob is true: the weight of the only expert is always 1, so "
                "the router could not learn; train with num_experts_per_tok of at least 2 or, where the family has it, "
                "with norm_topk_prob false"
            )
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        self.layers = [layer for layer in range(config.num_hidden_layers) if config.has_experts(layer)]
        self.n_experts, self.n_chosen = config.num_experts, config.num_experts_per_tok
        self.counts: Tensor | None = None
        self.sums: Tensor | None = None
        self._is_open = False
        self._targets = self._is_token = None
        self._recorded: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def reset(self) -> None:
        """Forget the counts and sums: a new step begins."""
        self.counts = self.sums = None

    def begin(self, batch: dict[str, Tensor], *, counts: Tensor | None = None) -> None:
        """Start a micro-batch; reads ``targets`` (B, T) and, where they are there, ``document_ids`` and ``weights``.

        Args:
            counts: (B,) what each row adds to the number that the loss is divided by (default: Σ weights of its
                targets, as for a token loss).
        """
        targets, document_ids, weights = batch["targets"], batch.get("document_ids"), batch.get("weights")
        if counts is None:
            counted = targets != -100
            counts = (counted if weights is None else weights * counted).sum(dim=1)
        self._targets = counts
        self._is_token = torch.ones_like(targets, dtype=torch.bool) if document_ids is None else document_ids >= 0
        self._recorded = {}
        self._is_open = True

    def record(self, layer: int, logits: Tensor, scores: Tensor, chosen: Tensor) -> None:
        """Take what a sparse layer's router computed: logits and scores (B, T, E), chosen experts (B, T, k).

        In a recomputation it does the same and stores nothing: checkpointing compares what both passes keep.
        """
        if self._is_token is None:
            raise RuntimeError("RouterStats.begin(batch) comes before the forward pass")
        if self._is_open and layer in self._recorded:
            raise RuntimeError(f"layer {layer} recorded twice: one forward pass between begin() and finish()")
        is_token = self._is_token[..., None].to(logits.dtype)  # (B, T, 1)
        n_tokens = is_token.sum(dim=1).clamp(min=1)  # (B, 1)
        with torch.no_grad():
            counts = logits.new_zeros(len(logits), self.n_experts)
            counts.scatter_add_(1, chosen.flatten(1), is_token.expand(chosen.shape).flatten(1))  # (B, E)
        load = counts * (self.n_experts / self.n_chosen) / n_tokens  # f
        shares = scores / scores.sum(dim=-1, keepdim=True)  # (B, T, E)
        share = (shares * is_token).sum(dim=1) / n_tokens  # (B, E): P
        z = (torch.logsumexp(logits, dim=-1, keepdim=True).square() * is_token).sum(dim=1) / n_tokens  # (B, 1)
        rows = torch.stack([(load * share).sum(dim=1), z[:, 0]])  # (2, B): balance, z
        terms = (rows * self._targets).sum(dim=1)  # (2,)
        term = self.aux_loss_coef * terms[0] + self.z_loss_coef * terms[1]
        if self._is_open:
            self._recorded[layer] = (term, counts.sum(dim=0), terms.detach())

    def finish(self) -> Tensor:
        """Return the scalar to add to the micro-batch's ``loss_sum``, and add its tokens to ``counts``."""
        missing = [layer for layer in self.layers if layer not in self._recorded]
        if missing:
            raise RuntimeError(f"sparse layers {missing} recorded nothing: give router_stats to the forward pass")
        self._is_open = False
        terms, counts, sums = zip(*(self._recorded.pop(layer) for layer in self.layers), strict=True)
        counts = torch.stack(counts)  # (sparse layers, E)
        wide = torch.float32 if counts.device.type == "mps" else torch.float64
        counts = counts.to(wide)
        sums = torch.cat([torch.stack(sums).to(wide).sum(dim=0), self._targets.sum().to(wide)[None]])  # (3,)
        self.counts = counts if self.counts is None else self.counts + counts
        self.sums = sums if self.sums is None else self.sums + sums
        return torch.stack(terms).sum()


def relative_entropy(shares: list[float]) -> float:
    """Return −Σ p ln p / ln E: 1 when all experts are equally busy, 0 when one does everything."""
    if len(shares) == 1:
        return 1.0
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))
