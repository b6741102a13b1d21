"""Chapter 8: positions as rotations: what depends on the distance alone, and a task that needs positions."""

import torch

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer
from minillm.model.rope import apply_rope, rope_frequencies, rope_tables

# 1. The score of a query and a key depends on the distance alone.
config = ModelConfig(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4)  # K = 64
torch.manual_seed(0)
query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)  # each (B, T, H, K)


def turned(x, position, config=config):
    return apply_rope(x, *rope_tables(torch.tensor([[position]]), config, dtype=x.dtype))


scores = [float((turned(query, 5 + shift) * turned(key, 2 + shift)).sum()) for shift in (0, 1000)]
print(f"difference of the scores at (5, 2) and (1005, 1002): {abs(scores[0] - scores[1]):.6f}")

# 2. Decay: an all-ones query meets an all-ones key, and the score is the mean of cos(distance · frequency).
ones = torch.ones(1, 1, 1, 64, dtype=torch.float64)
for distance in (0, 1, 10, 100, 1000):
    print(f"similarity at distance {distance}: {float((turned(ones, distance) * ones).mean()):.3f}")

# 3. Longer context: the angle of the slowest pair at the last position, before and after a stretch by 4.
for name, length, scaling in (
    ("trained", 2048, None),
    ("four times as long", 8192, None),
    ("four times as long, linear", 8192, {"rope_type": "linear", "factor": 4.0}),
):
    longer = ModelConfig(
        hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4,
        max_position_embeddings=length, rope_scaling=scaling,
    )  # fmt: skip
    last = torch.tensor([[length - 1]])
    frequencies, _ = rope_frequencies(last, longer, dtype=torch.float64)
    print(f"slowest angle, {name}: {float(last * frequencies[-1]):.3f}")

# 4. Which token stood three places back? One layer, with positions and with all positions 0.
V, T, B = 16, 24, 32
counts = torch.zeros(4000, V)
floor = 0.0
tokens = torch.randint(V, (4000, T))
for t in range(3, T):  # the entropy of a draw from the tokens before t
    counts = torch.nn.functional.one_hot(tokens[:, :t], V).sum(dim=1) / t
    floor += float(torch.special.entr(counts).sum(dim=1).mean()) / (T - 3)
print(f"floor without positions: {floor:.3f}")


def train(use_positions):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                    intermediate_size=128, rope_theta=1e4)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    position_ids = torch.arange(T)[None] * use_positions
    losses = []
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * min(1, (step + 1) / 20, (400 - step) / 100)
        ids = torch.randint(V, (B, T))
        targets = torch.full_like(ids, -100)
        targets[:, 3:] = ids[:, :-3]
        loss_sum, n_targets = cross_entropy(model(ids, position_ids=position_ids), targets)
        (loss_sum / n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum / n_targets))
    return sum(losses[-50:]) / 50


print(f"loss with RoPE: {train(True):.3f}")
print(f"loss without RoPE: {train(False):.3f}")
