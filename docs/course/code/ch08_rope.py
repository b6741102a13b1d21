"""Chapter 8: positions as rotations: what depends on the distance alone, and a task that needs positions."""

import torch

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer
from minillm.model.rope import apply_rope, rope_frequencies, rope_tables

torch.set_num_threads(1)  # the matrices are small: more threads would wait for one another

# 1. The score of a query and a key depends on the distance alone.
config = ModelConfig(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4)  # K = 64
torch.manual_seed(0)
query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)  # each (B, T, H, K)


def turned(x, position):
    """Return x (B, T, H, K) turned as at a position."""
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
    frequencies, _ = rope_frequencies(torch.tensor([[length - 1]]), longer, dtype=torch.float64)
    print(f"slowest angle, {name}: {(length - 1) * float(frequencies[-1]):.3f}")

# 4. Which token stood three places back? One layer, with its positions, and with all positions 0 (nothing is turned).
V, T, B = 16, 24, 32
floor = 0.0
tokens = torch.randint(V, (4000, T))
for t in range(3, T):  # without positions: any of the t tokens before, all equally likely
    shares = torch.nn.functional.one_hot(tokens[:, :t], V).sum(dim=1) / t  # (rows, V)
    floor += float(torch.special.entr(shares).sum(dim=1).mean()) / (T - 3)
print(f"floor without positions: {floor:.3f}")


def loss_after_training(use_positions):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=V, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                    intermediate_size=128, rope_theta=1e4)
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    position_ids = torch.arange(T)[None] * use_positions
    losses = []
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20, (400 - step) / 100)
        ids = torch.randint(V, (B, T))
        targets = torch.full_like(ids, -100)
        targets[:, 3:] = ids[:, :-3]
        loss_sum, n_targets = cross_entropy(model(ids, position_ids=position_ids), targets)
        (loss_sum / n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum.item() / n_targets.item())
    return sum(losses[-50:]) / 50  # fresh rows in every step, so this is no memory of them


print(f"loss with RoPE: {loss_after_training(True):.3f}")
print(f"loss without RoPE: {loss_after_training(False):.3f}")
