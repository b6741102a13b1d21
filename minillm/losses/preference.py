"""Losses of preference tuning: of pairs of replies, one chosen, one rejected, and of judged replies.

All start from the log-probability of a whole reply y to a prompt x under the policy, log pi = Σ log pi(y_t | x, y_<t),
and most compare it with that under a reference, the policy as it was. Written Δ = (log pi/ref of the chosen) - (of
the rejected), s = log σ:

    sigmoid   -s(βΔ)                              Rafailov et al., DPO (2023), equation 7
              -(1-ε) s(βΔ) - ε s(-βΔ)             with label_smoothing ε: Mitchell, cDPO (2023); a share ε is wrong
    robust    [-(1-ε) s(βΔ) + ε s(-βΔ)] / (1-2ε)  Chowdhury et al., rDPO (2024): unbiased under such labels
    ipo       (Δ - 1/(2β))²                       Azar et al. (2023), equation 17; Δ of means per token
    hinge     max(0, 1 - βΔ)                      Zhao et al., SLiC-HF (2023), with DPO's rewards
    simpo     -s(β (mean_c - mean_r) - γ)         Meng et al. (2024), equation 6; mean log pi per token, no reference;
                                                  with label_smoothing as sigmoid
    orpo      -mean_c - β s(log odds ratio)       Hong et al. (2024), equations 6 and 7; odds of means, no reference
    kto       λ (1 - σ(±β (log pi/ref - z)))      Ethayarajh et al. (2024), equation 8; judged replies, one by one

Legend: P pairs, or judged replies.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.errors import UserError

NEEDS_REFERENCE = frozenset({"sigmoid", "robust", "ipo", "hinge", "kto"})
NEEDS_LENGTHS = frozenset({"ipo", "simpo", "orpo"})
LOSS_TYPES = ("sigmoid", "robust", "ipo", "hinge", "simpo", "orpo")  # of pairs
SMOOTHED = ("sigmoid", "robust", "simpo")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor | None = None,
    ref_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    sft_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return ``(loss_sum, n_pairs)`` of pairs; n_pairs is a float64 scalar.

    Args:
        policy_chosen, policy_rejected: (P,) log-probabilities of the replies, in nats. All (P,) belong to real pairs:
            what ``sequence_log_probs`` gives for documents that a row does not have is to be left out.
        ref_chosen, ref_rejected: the same under the reference; None counts as 0 (a uniform reference). simpo and orpo
            take none.
        beta: scale of the rewards; for orpo the weight of its odds ratio.
        label_smoothing: ε, 0 to below 0.5. gamma: margin that simpo asks for.
        chosen_lengths, rejected_lengths: (P,) tokens of the replies, for ipo, simpo, orpo and ``sft_weight``.
        sft_weight: of the mean loss per token of the chosen reply, added per pair.

    Raises:
        UserError: an unknown loss, or settings that do not go with it.
    """
    lengths = chosen_lengths, rejected_lengths
    _check(loss_type, beta, label_smoothing, gamma, sft_weight, (ref_chosen, ref_rejected), lengths)
    good = policy_chosen if ref_chosen is None else policy_chosen - ref_chosen
    bad = policy_rejected if ref_rejected is None else policy_rejected - ref_rejected
    if loss_type in NEEDS_LENGTHS:
        good, bad = good / chosen_lengths, bad / rejected_lengths
    delta = good - bad
    if loss_type == "ipo":
        losses = (delta - 1 / (2 * beta)).square()
    elif loss_type == "hinge":
        losses = F.relu(1 - beta * delta)
    elif loss_type == "orpo":
        losses = -good - beta * F.logsigmoid(delta - _log1mexp(good) + _log1mexp(bad))
    else:
        reward = beta * delta - gamma
        slope = -label_smoothing / (1 - 2 * label_smoothing) if loss_type == "robust" else label_smoothing
        # With log σ(-x) = log σ(x) - x: -(1-ε) log σ(x) - ε log σ(-x) = -log σ(x) + ε x, which is exactly ln 2 at 0.
        # The robust loss is the same with the slope -ε / (1 - 2 ε) in place of ε.
        losses = slope * reward - F.logsigmoid(reward)
    if sft_weight:
        losses = losses - sft_weight * policy_chosen / chosen_lengths
    return losses.sum(), _count(losses)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    baseline: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return ``(loss_sum, n_replies)`` of judged replies: a good one should have more reward than the baseline.

    Args:
        policy, reference: (P,) log-probabilities of the replies. labels: (P,) true for a good one.
        baseline: scalar in nats, without gradient (see ``kto_baseline``).
        desirable_weight, undesirable_weight: λ of good and bad replies.
    """
    if beta <= 0:
        raise UserError(f"beta {beta}: must be positive")
    reward = beta * (policy - reference - baseline.detach())
    # 1 - σ(x) is σ(-x), which does not lose its digits where σ(x) is nearly 1.
    good, bad = desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward)
    losses = torch.where(labels, good, bad)
    return losses.sum(), _count(losses)


def kto_baseline(log_ratio_sum: Tensor, n: Tensor) -> Tensor:
    """Return KTO's baseline in nats: the mean of log pi - log ref over replies to other prompts, at least 0.

    It estimates how far the policy has moved from the reference at all. Ethayarajh et al. (2024), section 4.1.

    Args:
        log_ratio_sum, n: scalars, of the whole step, over all its micro-batches and ranks.
    """
    return (log_ratio_sum / n.clamp(min=1)).clamp(min=0).detach()


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, without the loss of digits near 0; absolute error of one rounding elsewhere."""
    # A reply of probability 1 has no odds, so no log-probability is nearer to 0 than 1's last digit.
    return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(x.dtype).eps)))


def _count(losses: Tensor) -> Tensor:
    wide = torch.float32 if losses.device.type == "mps" else torch.float64
    return torch.tensor(losses.numel(), dtype=wide, device=losses.device)


def _check(loss_type, beta, label_smoothing, gamma, sft_weight, references, lengths) -> None:
    if loss_type not in LOSS_TYPES:
        raise UserError(f"loss_type {loss_type!r}: choose from {', '.join(LOSS_TYPES)} (kto: kto_loss)")
    if beta <= 0:
        raise UserError(f"beta {beta}: must be positive")
    if not 0 <= label_smoothing < 0.5:
        raise UserError(f"label_smoothing {label_smoothing}: must be 0 to below 0.5")
    if label_smoothing and loss_type not in SMOOTHED:
        raise UserError(f"label_smoothing {label_smoothing}: goes with {', '.join(SMOOTHED)}, not {loss_type}")
    if gamma and loss_type != "simpo":
        raise UserError(f"gamma {gamma}: goes with simpo, not {loss_type}")
    if gamma < 0 or sft_weight < 0:
        raise UserError(f"gamma {gamma}, sft_weight {sft_weight}: must not be negative")
    if (references[0] is None) != (references[1] is None):
        raise UserError("ref_chosen and ref_rejected: give both or neither")
    if references[0] is not None and loss_type not in NEEDS_REFERENCE:
        raise UserError(f"{loss_type} has no reference: leave ref_chosen and ref_rejected out")
    if (loss_type in NEEDS_LENGTHS or sft_weight) and any(n is None for n in lengths):
        raise UserError(f"{loss_type} (or sft_weight) takes means per token: give chosen_lengths and rejected_lengths")
