"""Preference tuning inside a run: from a batch of replies to the loss, and the figures that tell how it goes.

Legend: B rows, T positions, P pairs.
"""

import torch
from torch import Tensor, nn

from minillm.data.pairs import count_documents, count_pairs, count_replies
from minillm.distributed.engine import Engine
from minillm.losses import dpo_loss, kto_baseline, kto_loss, sequence_log_probs
from minillm.objectives.objective import Batch, Objective
from minillm.objectives.reference import COLUMN, Reference, token_log_probs
from minillm.reports.measures import Measures

PAIR_FIGURES = (
    "accuracy", "margin", "reward_chosen", "reward_rejected", "log_prob_chosen", "log_prob_rejected", "length_chosen",
    "length_rejected",
)  # fmt: skip
KTO_FIGURES = ("accuracy", "reward_good", "reward_bad", "log_prob_good", "log_prob_bad", "length", "baseline")
FALL = 0.5  # nats below the reference, mean per reply: a larger fall is reported


class PreferenceLoss(Objective):
    """The loss of preference tuning, on batches to which ``prepare`` has added the reference's log-probabilities.

    Figures, means since the last row of metrics: ``reward`` = beta (log pi - log reference) of a reply (without a
    reference: beta times its mean log-probability), ``margin`` = chosen minus rejected, ``accuracy`` the share of
    pairs with a margin above 0, ``kl`` an estimate of KL(reference || policy) per reply in nats, taken on the data's
    own replies: the sum over tokens of r - 1 - ln r with r = pi / reference (Schulman, Approximating KL divergence,
    2020), ``length`` in tokens.

    Args:
        policy: the model that is trained. reference: None for losses that have none.
        args: of the run, with the settings of the loss. engine: for device, dtype and ranks.
    """

    def __init__(self, policy: nn.Module, reference: Reference | None, args, engine: Engine):
        self.policy, self.reference, self.args, self.engine = policy, reference, args, engine
        self.is_kto = args.loss_type == "kto"
        self.unit = "reply" if self.is_kto else "pair"
        figures = KTO_FIGURES if self.is_kto else PAIR_FIGURES
        self.measures = Measures(
            figures + (("kl",) if reference else ()),
            shown=("accuracy", "margin", "reward_good", "reward_bad", "kl"),
            notes=self._notes,
        )
        self._has_fallen = False

    def settings(self) -> dict:
        """Return what must match to resume."""
        names = ("loss_type", "beta", "label_smoothing", "gamma", "sft_weight", "desirable_weight",
                 "undesirable_weight", "from_weight")  # fmt: skip
        weights = self.reference.hash if self.reference else ""
        return {name: getattr(self.args, name) for name in names} | {"reference's weights": weights}

    def count(self, batch: Batch) -> Tensor:
        """Return the number of pairs, or of judged replies, of a batch (float64 scalar)."""
        return count_replies(batch) if self.is_kto else count_pairs(batch)

    @torch.no_grad()
    def prepare(self, micro_batches: list[Batch], *, training: bool, step: int) -> list[Batch]:
        """Return the micro-batches of a step with the reference's log-probabilities and, for KTO, the baseline.

        The baseline is a mean over the whole step, all micro-batches and ranks, so it is there before the first
        gradient.
        """
        if self.reference is None:
            return micro_batches
        if self.reference.kind != "cached":
            micro_batches = [batch | self.reference.columns(batch) for batch in micro_batches]
        if not self.is_kto:
            return micro_batches
        total = torch.zeros(2, dtype=self.engine.sum_dtype, device=self.engine.device)
        for batch in micro_batches:
            batch = self.engine.to_device(batch)
            with self.engine.autocast():
                policy = token_log_probs(self.policy, batch, prefix="other_")
            n = count_documents(batch["other_document_ids"]).sum()
            total += torch.stack([(policy - batch["other_" + COLUMN]).sum().to(total), n.to(total)])
        baseline = kto_baseline(*self.engine.ranks.sum(total))
        return [batch | {"baseline": baseline} for batch in micro_batches]

    def __call__(self, model, batch: dict[str, Tensor], router_stats=None) -> tuple[Tensor, Tensor]:
        """Return ``(loss_sum, n)``: summed over the pairs, or judged replies, of a batch, and their number."""
        if router_stats is not None:
            router_stats.begin(batch, counts=count_documents(batch["document_ids"]) / (1 if self.is_kto else 2))
        log_probs = token_log_probs(model, batch, router_stats)  # (B, T)
        where = batch["targets"], batch["document_ids"]
        sums, lengths = sequence_log_probs(log_probs, *where)  # (B, documents of the fullest row)
        reference = sequence_log_probs(batch[COLUMN], *where)[0] if self.reference else None
        divergence = sequence_log_probs(_divergence(log_probs, batch[COLUMN]), *where)[0] if self.reference else None
        loss_sum, n = (self._kto if self.is_kto else self._pairs)(batch, sums, lengths, reference, divergence)
        return (loss_sum if router_stats is None else loss_sum + router_stats.finish()), n

    def _pairs(self, batch, sums, lengths, reference, divergence) -> tuple[Tensor, Tensor]:
        args, n = self.args, sums.shape[1] // 2
        is_pair = lengths[:, 0 : 2 * n : 2] > 0

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            return values[:, 0 : 2 * n : 2][is_pair], values[:, 1 : 2 * n : 2][is_pair]  # (P,) each

        (chosen, rejected), (n_chosen, n_rejected) = sides(sums), sides(lengths)
        ref_chosen, ref_rejected = (None, None) if reference is None else sides(reference)
        loss_sum, n_pairs = dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=args.beta,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing,
            gamma=args.gamma,
            chosen_lengths=n_chosen,
            rejected_lengths=n_rejected,
            sft_weight=args.sft_weight,
        )
        good = chosen / n_chosen if reference is None else chosen - ref_chosen
        bad = rejected / n_rejected if reference is None else rejected - ref_rejected
        figures = ((good > bad).float(), args.beta * (good - bad), args.beta * good, args.beta * bad)
        figures += (chosen, rejected, n_chosen, n_rejected) + (() if reference is None else (divergence[lengths > 0],))
        self.measures.add(**dict(zip(self.measures.names, figures, strict=True)))
        return loss_sum, n_pairs

    def _kto(self, batch, sums, lengths, reference, divergence) -> tuple[Tensor, Tensor]:
        args, is_reply = self.args, lengths > 0
        good = sequence_log_probs(batch["labels"].to(sums.dtype), batch["targets"], batch["document_ids"])[0] > 0
        policy, ref, labels = sums[is_reply], reference[is_reply], good[is_reply]
        loss_sum, n_replies = kto_loss(
            policy,
            ref,
            labels,
            batch["baseline"].to(policy.dtype),
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
        )
        ratio = policy - ref
        reward = args.beta * ratio
        figures = (((ratio > batch["baseline"]) == labels).float(), reward[labels], reward[~labels])
        figures += (policy[labels], policy[~labels], lengths[is_reply], batch["baseline"].expand(len(policy)))
        self.measures.add(**dict(zip(self.measures.names, (*figures, divergence[is_reply]), strict=True)))
        return loss_sum, n_replies

    def _notes(self, row: dict) -> list[str]:
        if self.reference is None or self.is_kto:
            return []
        rewards = row["reward_chosen"], row["reward_rejected"]
        fallen = max(rewards) < -FALL * self.args.beta
        is_known, self._has_fallen = self._has_fallen, fallen
        if not fallen or is_known:
            return []
        return [
            f"warning: the log-probabilities of chosen and rejected replies both fall below the reference's (rewards "
            f"{rewards[0]:.3f} and {rewards[1]:.3f}): probability goes to neither; a lower --learning_rate, a higher "
            f"--beta or --sft_weight keeps the chosen ones up"
        ]


def _divergence(policy: Tensor, reference: Tensor) -> Tensor:
    """Return r - 1 - ln r of every target, r = pi / reference; 0 where there is none."""
    log_ratio = policy.detach() - reference
    return torch.expm1(log_ratio) - log_ratio
