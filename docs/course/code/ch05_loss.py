"""Chapter 5: the loss of a model that knows nothing, the floor that no model passes, and the mean that is not one."""

import math

import torch

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer

V = 1024
torch.manual_seed(0)

# 1. A model that knows nothing gives each of the V tokens the probability 1/V.
model = Transformer(ModelConfig.preset("demo"))
ids = torch.randint(V, (4, 65))  # (B, T + 1)
with torch.no_grad():
    loss_sum, n_targets = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
print(f"ln V: {math.log(V):.4f}")
print(f"loss at the start: {loss_sum / n_targets:.4f}")

# 2. The best possible guesser of a loaded coin: its loss is the coin's entropy, however many throws it sees.
p = torch.tensor([0.9, 0.1])
throws = torch.multinomial(p, 200_000, replacement=True)
loss_sum, n_targets = cross_entropy(p.log().expand(len(throws), 2), throws)
print(f"entropy of the coin: {-(p * p.log()).sum():.4f}")
print(f"loss of the best guesser: {loss_sum / n_targets:.4f}")

# 3. Two micro-batches, with 1 and with 9 targets: the mean of their means is not the mean of the ten losses.
losses = torch.tensor([6.0, *[1.0] * 9])
first, second = losses[:1], losses[1:]
print(f"mean over all targets: {losses.mean():.4f}")
print(f"mean of the two means: {(first.mean() + second.mean()) / 2:.4f}")
