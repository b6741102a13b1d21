"""Chapter 7: attention as three lines, and a task that one layer cannot do and two can."""

import math

import torch

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer
from minillm.model.attention_plan import AttentionPlan, attend

torch.set_num_threads(1)  # the matrices are small: more threads would wait for one another

# 1. By hand, for four positions of one head of width 2.
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4, 2)  # each (B, H, T, K)
scores = q @ k.transpose(-1, -2) / math.sqrt(2)  # (B, H, T, S)
hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)  # keys that come after the query
by_hand = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v  # (B, H, T, K)
difference = (by_hand - attend(q, k, v, AttentionPlan(is_causal=True))).abs().max()
print(f"difference from the library: {difference:.6f}")

# 2. Why the scores are divided by sqrt(K): without it they spread with K, and softmax becomes a hard choice.
q, keys = torch.randn(2000, 64), torch.randn(16, 64)
scores = q @ keys.T  # (2000, 16)
print(f"spread of the scores, K = 64: {(torch.randn(100_000, 64) * torch.randn(100_000, 64)).sum(-1).std():.2f}")
print(f"largest weight of 16 keys, divided: {(scores / 8).softmax(-1).max(-1).values.mean():.2f}")
print(f"largest weight of 16 keys, not divided: {scores.softmax(-1).max(-1).values.mean():.2f}")

# 3. A row is a random text of 4 to 10 different tokens, repeated until it has 25. How far back the earlier copy stands
#    is different in every row. Only the repeated part has targets.
V, T, B = 16, 24, 32


def rows(generator):
    """Return inputs and targets, each (B, T); targets are -100 where nothing can be known."""
    period = torch.randint(4, 11, (B, 1), generator=generator)
    text = torch.rand(B, V, generator=generator).argsort(dim=1)  # (B, V): a permutation of the tokens
    ids = text.gather(1, torch.arange(T + 1) % period)  # (B, T + 1)
    return ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(1, T + 1) <= period, -100)


def loss_after_training(n_layers, n_steps=500):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = ModelConfig(
        vocab_size=V, hidden_size=64, num_hidden_layers=n_layers, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=128, rope_theta=1e4, initializer_range=0.1,
    )  # fmt: skip
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(n_steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50, (n_steps - step) / 200)
        inputs, targets = rows(generator)
        loss_sum, n_targets = cross_entropy(model(inputs), targets)
        (loss_sum / n_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # rows that it has not seen
        parts = [cross_entropy(model(inputs), targets) for inputs, targets in (rows(generator) for _ in range(20))]
    return float(sum(loss_sum for loss_sum, _ in parts) / sum(n_targets for _, n_targets in parts))


# A guess among the tokens of the text: ln(period), averaged over all targets.
n_targets = {period: T - period for period in range(4, 11)}
guess = sum(n * math.log(period) for period, n in n_targets.items()) / sum(n_targets.values())
print(f"a guess among the tokens of the text: {guess:.3f}")
print(f"loss with one layer: {loss_after_training(1):.3f}")
print(f"loss with two layers: {loss_after_training(2):.3f}")
