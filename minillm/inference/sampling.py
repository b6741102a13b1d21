"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, then one draw per row.

The order is that of transformers' ``generate``: repetition penalty, temperature, top-k, top-p, min-p. Each step works
on the result of the step before it. Temperature 0 takes the largest penalised logit and ignores the other options.

Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.errors import UserError

GREEDY_BELOW = 1e-5  # a lower temperature is greedy: dividing by it could overflow float32
MAX_TEMPERATURE = 1e6  # all tokens are alike long before
MAX_PENALTY = 1e3  # logits times or divided by it stay finite


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen; the defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """Logits are divided by this; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens, and whatever ties with the k-th (0: all)."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability reaches this (1: all)."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the best token's probability (0: all)."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in prompt or answer: divided by this if positive, else multiplied (1: off)."""

    def __post_init__(self):
        limits = {
            "temperature": (
                0.0 <= self.temperature <= MAX_TEMPERATURE,
                f"must be 0 (greedy) or a positive number up to {MAX_TEMPERATURE:,.0f}",
            ),
            "top_k": (self.top_k >= 0 and self.top_k % 1 == 0, "must be 0 (off) or a whole number"),
            "top_p": (0.0 < self.top_p <= 1.0, "must be above 0 and at most 1 (1 is off)"),
            "min_p": (0.0 <= self.min_p <= 1.0, "must lie between 0 (off) and 1"),
            "repetition_penalty": (
                1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY,
                f"must lie between {1 / MAX_PENALTY:g} and {MAX_PENALTY:,.0f} (1 is off)",
            ),
        }
        for name, (is_valid, rule) in limits.items():
            if not is_valid:
                raise UserError(f"{name} {getattr(self, name)}: {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without any randomness."""
        return self.temperature < GREEDY_BELOW


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) with the tokens marked in ``seen`` (B, V, bool) made less likely.

    CTRL (Keskar et al. 2019), section 4.1: positive logits are divided by ``penalty``, negative ones multiplied. How
    often a token occurred makes no difference.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return logits (B, V) with all but the k largest of each row at -inf; ties with the k-th stay."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return logits (B, V) reduced to the nucleus: the fewest tokens whose probabilities reach ``p``.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1. Probabilities are summed from the
    smallest on: a token is removed if it and all smaller ones together have at most probability 1 - p.
    """
    ascending, order = logits.sort(dim=-1)
    is_removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    is_removed[..., -1] = False  # the best token always stays, also after rounding
    return logits.masked_fill(torch.zeros_like(is_removed).scatter(-1, order, is_removed), -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Return logits (B, V) without the tokens less probable than ``min_p`` times the row's best.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
    """
    probabilities = logits.softmax(dim=-1)
    best = probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < min_p * best, -math.inf)


def process_logits(logits: Tensor, options: SamplingOptions, seen: Tensor | None = None) -> Tensor:
    """Return logits (B, V), at least float32, after penalty, temperature, top-k, top-p and min-p.

    ``seen`` (B, V, bool) marks the tokens of the prompt and of the answer so far; only a ``repetition_penalty`` other
    than 1 needs it. Excluded tokens have the logit -inf. Greedy options apply only the penalty.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    if options.greedy:
        return logits
    if options.temperature != 1.0:
        logits = logits / options.temperature
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1.0:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0.0:
        logits = keep_min_p(logits, options.min_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return one token per row, (B,) int64, by inverting the cumulative distribution at ``uniform`` (B,).

    Unlike with ``torch.multinomial`` on a batch, a row's token depends only on its own number and logits. A token with
    the logit -inf is never drawn.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no float64
    cumulative = logits.to(wide).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[..., -1]
    # The largest number below the total: after rounding, uniform * total must not go beyond the last token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform.to(logits.device, wide) * total, below_total)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def sample(
    logits: Tensor, options: SamplingOptions, *, seen: Tensor | None = None, uniform: Tensor | None = None
) -> Tensor:
    """Return the next token of each row, (B,) int64, from logits (B, V).

    ``uniform`` (B,) holds one number in [0, 1) per row (see :func:`row_uniforms`); greedy needs none.
    """
    logits = process_logits(logits, options, seen)
    return logits.argmax(dim=-1) if options.greedy else draw(logits, uniform)


def row_uniforms(n_rows: int, n_draws: int, generator: torch.Generator | None = None) -> Tensor:
    """Return uniform numbers in [0, 1), (n_rows, n_draws) float64 on the CPU, each row with its own random stream.

    ``generator`` (on any device; None: torch's default) gives one seed per row, in order. A row's numbers depend only
    on its seed; its first n numbers do not depend on ``n_draws``. So two prompts get the same numbers in one call as in
    two calls that share the generator.
    """
    device = generator.device if generator is not None else "cpu"
    numbers = torch.empty(n_rows, n_draws, dtype=torch.float64)
    for row in range(n_rows):
        seed = int(torch.randint(2**62, (1,), generator=generator, device=device))
        numbers[row].uniform_(generator=torch.Generator().manual_seed(seed))
    return numbers
