"""White-box distillation: a student learns a teacher's whole distribution over the next token.

A text says which token came next; a teacher says how likely every token was, which is far more per position. Hinton et
al., Distilling the Knowledge in a Neural Network (2015), section 2: both distributions are softened by a temperature,
p = softmax(teacher / T) and q = softmax(student / T), and the divergence is multiplied by T², so that its gradient
stays as large as that of the cross-entropy next to it:

    α · CE(student, target) + (1 - α) · T² · D(p, q)

    forward     KL(p || q)                              q covers all that p does
    reverse     KL(q || p)                              q keeps to what p does most: Gu et al., MiniLLM (2024)
    symmetric   the mean of both
    js          (KL(p || m) + KL(q || m)) / 2           m = (p + q) / 2: Agarwal et al., GKD (2024), equation 1, β = 1/2

Legend: N positions with a target, V vocabulary, D hidden (of student and teacher), k the teacher's best tokens.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.errors import UserError
from minillm.kernels.chunked_loss import CHUNK_NUMEL, chunked_loss
from minillm.kernels.products import chunks, output_operand, product_dtype, product_in_float32
from minillm.losses.cross_entropy import IGNORE_INDEX, count_targets, positions_with_target

DIVERGENCES = ("forward", "reverse", "symmetric", "js")
LEAST_LOG = -1000.0  # of a probability that is 0: exp of it is 0 even in float64


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward",
) -> tuple[Tensor, Tensor]:
    """Return ``(loss_sum, n_targets)`` of given logits, in float32 at least.

    Args:
        student_logits: (..., V). teacher_logits: (..., V or more); further columns, the padding of an embedding, are
            left out. The teacher gets no gradient.
        targets: (...), ``IGNORE_INDEX`` where nothing is learnt. weights: (...), per target; None for ones.
        alpha: weight of the cross-entropy. temperature: T. divergence: see above.

    Raises:
        UserError: a setting out of range; a teacher with a smaller vocabulary.
    """
    return linear_distill_loss(
        student_logits,
        None,
        teacher_logits,
        None,
        targets,
        weights,
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
    )


def linear_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward",
    target_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``distill_loss`` of ``student_hidden @ student_weight.T`` and the teacher's, which are never whole.

    Logits of both models exist for one chunk of positions at a time; the gradient of a chunk is formed at once.

    Args:
        student_hidden, teacher_hidden: (..., D), widths of their own; (..., V) logits where the weight is None.
        student_weight, teacher_weight: (V, D), the output layers.
        target_positions: (N,), what ``positions_with_target(targets)`` returns, where the batch knows it already.
    """
    _check(alpha, temperature, divergence)
    n_student = (student_hidden if student_weight is None else student_weight.T).shape[-1]
    n_teacher = (teacher_hidden if teacher_weight is None else teacher_weight.T).shape[-1]
    if n_teacher < n_student:
        raise UserError(f"the teacher knows {n_teacher} tokens, the student {n_student}: give them the same tokenizer")
    dtype = product_dtype(teacher_hidden)  # here, since autocast is off inside of the chunks
    output = None if teacher_weight is None else output_operand(teacher_weight[:n_student].detach(), dtype)

    def compare(student: Tensor, hidden: Tensor) -> Tensor:
        teacher = hidden[:, :n_student] if output is None else product_in_float32(hidden.to(dtype), output.T)
        p = F.log_softmax(teacher.to(student.dtype) / temperature, dim=-1)  # (n, V)
        return _divergence(p, F.log_softmax(student / temperature, dim=-1), divergence)

    loss = partial(_mix, compare=compare, alpha=alpha, temperature=temperature)
    return _over_targets(
        loss, student_hidden, student_weight, targets, weights, target_positions, teacher_hidden.detach()
    )


def linear_top_k_distill_loss(
    student_hidden: Tensor,
    student_weight: Tensor | None,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    teacher_log_rest: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    alpha: float = 0.0,
    temperature: float = 1.0,
    divergence: str = "forward",
    target_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the same loss with a teacher of whom only the k best tokens of every position are known.

    All other tokens count as one, "the rest", for both. The divergence is then at most the true one (merging tokens
    can only hide differences), and equal to it when k is V - 1 or more.

    Args:
        teacher_ids, teacher_log_probs: (..., k), and teacher_log_rest: (..., 1), from ``top_k_teacher`` with the same
            temperature. Log-probabilities may be rounded to float16: a divergence feels their errors squared. The rest
            may not: where the teacher is sure it is far less than those roundings.
    """
    _check(alpha, temperature, divergence)

    def compare(student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor) -> Tensor:
        everything = F.log_softmax(student / temperature, dim=-1)  # (n, V)
        p, q = log_probs.to(student.dtype), everything.gather(1, ids)  # (n, k)
        if ids.shape[1] < student.shape[1]:  # both rests are summed over their own tokens: exact however small
            # A teacher without other tokens has a rest of 0, whose logarithm would make 0 times infinity.
            p = torch.cat([p, log_rest.to(student.dtype).clamp(min=LEAST_LOG)], dim=1)  # (n, k + 1)
            q = torch.cat([q, everything.scatter(1, ids, -math.inf).logsumexp(dim=1, keepdim=True)], dim=1)
        return _divergence(p, q, divergence)

    loss = partial(_mix, compare=compare, alpha=alpha, temperature=temperature)
    teacher = teacher_ids, teacher_log_probs, teacher_log_rest
    return _over_targets(loss, student_hidden, student_weight, targets, weights, target_positions, *teacher)


@torch.no_grad()
def top_k_teacher(
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    targets: Tensor,
    *,
    k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best tokens of every position that has a target, and what is left for all others, at T.

    That is ids and log-probabilities, (..., k) each, and the logarithm of the other tokens' sum, (..., 1), in at least
    float32 (-inf where there are no others). All are 0 elsewhere. ``vocab_size`` limits the tokens to the first ones.

    Raises:
        UserError: k is not between 1 and the number of tokens; a temperature out of range.
    """
    _check(temperature=temperature)
    n_tokens = (teacher_hidden if teacher_weight is None else teacher_weight.T).shape[-1]
    n_tokens = min(n_tokens, vocab_size or n_tokens)
    if not 1 <= k <= n_tokens:
        raise UserError(f"top_k {k}: the teacher knows {n_tokens} tokens, choose 1 to {n_tokens}")
    rows = positions_with_target(targets)  # (N,)
    used = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])[rows]
    dtype = product_dtype(used)
    output = None if teacher_weight is None else output_operand(teacher_weight[:n_tokens], dtype)
    ids = torch.zeros(targets.numel(), k, dtype=torch.long, device=targets.device)
    log_probs = torch.zeros(targets.numel(), k, dtype=_wide(used), device=targets.device)
    log_rest = torch.zeros(targets.numel(), 1, dtype=_wide(used), device=targets.device)
    with torch.autocast(used.device.type, enabled=False):
        for chunk in chunks(len(rows), n_tokens, numel=CHUNK_NUMEL, device=used.device):
            short = used[chunk].to(dtype)
            logits = short[:, :n_tokens] if output is None else product_in_float32(short, output.T)
            everything = F.log_softmax(logits.to(_wide(used)) / temperature, dim=-1)  # (n, V)
            best = everything.topk(k, dim=-1)
            ids[rows[chunk]], log_probs[rows[chunk]] = best.indices, best.values
            log_rest[rows[chunk]] = everything.scatter_(1, best.indices, -math.inf).logsumexp(dim=1, keepdim=True)
    return tuple(column.view(*targets.shape, -1) for column in (ids, log_probs, log_rest))


def hidden_distance(
    student_hidden: Tensor, teacher_hidden: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(sum, n_targets)`` of the squared distances between hidden states at length 1, where there are targets.

    Sun et al., Patient Knowledge Distillation (2019), equation 7. Between 0 and 4 per position, whatever the scales.

    Args:
        student_hidden, teacher_hidden: (..., D) of one width; a projection brings the student's to it.
    """
    wide = _wide(student_hidden)
    student, teacher = (F.normalize(t.to(wide), dim=-1) for t in (student_hidden, teacher_hidden.detach()))
    distances = (student - teacher).square().sum(dim=-1)
    factors = (targets != IGNORE_INDEX).to(wide)
    return (distances * (factors if weights is None else factors * weights)).sum(), count_targets(targets, weights)


# ---- one position ---------------------------------------------------------------------------------------------


def _mix(student: Tensor, targets: Tensor, *teacher: Tensor, compare: Callable, alpha: float, temperature: float):
    """Return the loss of every position, (n,), from the student's logits (n, V)."""
    losses = 0.0
    if alpha < 1:
        losses = (1 - alpha) * temperature**2 * compare(student, *teacher)
    if alpha:
        losses = losses + alpha * F.cross_entropy(student, targets, reduction="none")
    return losses


def _divergence(p: Tensor, q: Tensor, kind: str) -> Tensor:
    """Return D(p, q) of log-probabilities (n, V): (n,)."""
    if kind == "forward":
        return _kl(p, q)
    if kind == "reverse":
        return _kl(q, p)
    if kind == "symmetric":
        return (_kl(p, q) + _kl(q, p)) / 2
    # From the gap of the two logarithms, log(high / m) keeps all its digits however small it is, and is 0 at p = q.
    low, high = torch.minimum(p, q), torch.maximum(p, q)
    gap = low - high
    above = -torch.log1p(torch.expm1(gap) / 2)  # log(high / m)
    return (high.exp() * above + low.exp() * (above + gap)).sum(dim=-1) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # Both sum to 1, so - p + q adds nothing; but with it the gradient at p = q is 0 to the last bit, token by token.
    p_exp = p.exp()
    return (p_exp * (p - q) - p_exp + q.exp()).sum(dim=-1)


# ---- all positions --------------------------------------------------------------------------------------------


def _over_targets(
    loss: Callable, hidden: Tensor, weight: Tensor | None, targets: Tensor, weights, target_positions, *teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``(loss_sum, n_targets)`` of ``loss(logits, targets, *teacher)`` over all positions with a target."""
    rows = positions_with_target(targets) if target_positions is None else target_positions  # (N,)
    used = hidden.reshape(-1, hidden.shape[-1])[rows]
    flat = [t.reshape(-1, t.shape[-1])[rows] for t in teacher]
    factors = None if weights is None else weights.reshape(-1)[rows]
    loss_sum = chunked_loss(loss, used, weight, targets.reshape(-1)[rows], factors, *flat)
    return loss_sum, count_targets(targets, weights)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(alpha: float = 0.0, temperature: float = 1.0, divergence: str = "forward") -> None:
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha {alpha}: must lie between 0 and 1")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature {temperature}: must be positive and finite")
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence {divergence!r}: choose from {', '.join(DIVERGENCES)}")
