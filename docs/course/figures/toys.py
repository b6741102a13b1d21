"""What the pictures' small models learn from, and how.

Legend: V vocabulary, B rows of a batch, T positions, N rows.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.losses import causal_lm_loss
from minillm.model import RouterStats, Transformer
from minillm.training.optim import adamw
from minillm.training.schedule import Schedule, schedule_factor

WARM_UP = 30  # steps before the probability of a pair of tokens no longer depends on the first two


class Chain:
    """Texts in which the next token depends on the two before it. Their entropy is known exactly.

    Attributes:
        probabilities: (V, V, V), P(c | a, b) of the token c after a and b.
    """

    def __init__(self, vocab_size: int, *, seed: int = 0, near: float = 1.5, far: float = 1.8):
        """Draw the probabilities; ``near`` and ``far``: how much the last token and the one before it decide."""
        generator = torch.Generator().manual_seed(seed)
        of_last = near * torch.randn(vocab_size, vocab_size, generator=generator)
        of_both = far * torch.randn(vocab_size, vocab_size, vocab_size, generator=generator)
        self.probabilities = (of_last + of_both).double().softmax(dim=-1)

    def texts(self, n_rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Return random texts, (N, length)."""
        return self.continued(torch.zeros(n_rows, 2, dtype=torch.long), WARM_UP + length, generator)[:, -length:]

    def continued(self, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
        """Return ids (N, T), T at least 2, with ``length`` more tokens, (N, T + length)."""
        for _ in range(length):
            after = self.probabilities[ids[:, -2], ids[:, -1]]  # (N, V)
            ids = torch.cat([ids, torch.multinomial(after, 1, generator=generator)], dim=1)
        return ids

    def entropies(self) -> list[float]:
        """Return the entropy of a token in nats, knowing nothing, the token before it, and the two before it."""
        n = len(self.probabilities)
        pairs = torch.full((n, n), 1 / n**2, dtype=torch.float64)  # (V, V): P(a, b)
        for _ in range(200):
            pairs = torch.einsum("ab,abc->bc", pairs, self.probabilities)
        triples = pairs[:, :, None] * self.probabilities  # (V, V, V)
        one, two = triples.sum(dim=(0, 1)), triples.sum(dim=0)  # P(c), P(b, c)
        entropy = [float(torch.special.entr(p).sum()) for p in (one, pairs.sum(dim=0), two, pairs, triples)]
        return [entropy[0], entropy[2] - entropy[1], entropy[4] - entropy[3]]


def batches_of(ids: Tensor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yield texts (N, T + 1) as batches of B rows, in their order."""
    for rows in ids.split(batch_size):
        yield {"input_ids": rows[:, :-1], "targets": rows[:, 1:]}


def new_model(vocab_size: int, *, seed: int = 0, **options) -> Transformer:
    """Return a small model with random weights."""
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 192, "rope_theta": 1e4, "max_position_embeddings": 128,
    }  # fmt: skip
    return Transformer(ModelConfig(vocab_size=vocab_size, **(shape | options)))


def train(
    model: Transformer,
    batches: Iterator[dict[str, Tensor]],
    *,
    n_steps: int,
    learning_rate: float,
    loss: Callable = causal_lm_loss,
    router_stats: RouterStats | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Train with one batch a step; return the loss of every step, before its update.

    Args:
        loss: as ``causal_lm_loss``. after_step: called with the number of the step, from 1.
    """
    optimizer = adamw(model, learning_rate=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = Schedule(optimizer, schedule_factor("cosine", total_steps=n_steps, warmup_steps=20, min_ratio=0.05))
    losses = []
    for step, batch in zip(range(n_steps), batches, strict=False):
        schedule.set_step(step)
        loss_sum, n_targets = loss(model, batch, router_stats)
        (loss_sum / n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum.detach() / n_targets))
        after_step(step + 1)
    return losses


def trained_on(chain: Chain, *, n_steps: int) -> tuple[Transformer, list[float]]:
    """Return a new model trained on texts of a chain, and the loss of every step."""
    ids = chain.texts(32 * n_steps, 33, torch.Generator().manual_seed(1))
    model = new_model(len(chain.probabilities))
    return model, train(model, batches_of(ids, 32), n_steps=n_steps, learning_rate=4e-3)
