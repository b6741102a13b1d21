"""Chapter 3: a table of vectors, scores for the next token, and the smallest model that learns a language."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer

torch.manual_seed(0)

# 1. Looking up a row is a product with a one-hot vector; only the rows that were looked up get a gradient.
table = nn.Embedding(10, 4)
ids = torch.tensor([2, 7, 2, 5])
one_hot = F.one_hot(ids, 10).float() @ table.weight
print(f"difference of lookup and one-hot product: {(table(ids) - one_hot).abs().max():.4f}")
table(ids).sum().backward()
print(f"rows with a gradient: {int((table.weight.grad != 0).any(dim=1).sum())}")
print(f"gradient of the row that occurs twice: {table.weight.grad[2, 0]:.4f}")

# 2. A language of eight tokens: after token i comes i + 1 with probability 0.7, else i + 3 (both modulo 8).
V, n = 8, 20_000
jumps = torch.where(torch.rand(n) < 0.7, 1, 3)
text = jumps.cumsum(0) % V
inputs, targets = text[:-1], text[1:]
model = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V, bias=False))
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
for step in range(201):
    loss_sum, n_targets = cross_entropy(model(inputs), targets)
    loss = loss_sum / n_targets
    if step == 0:
        print(f"loss before training: {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"ln 8, for who knows no context: {math.log(V):.4f}")
print(f"entropy of the next token: {-(0.7 * math.log(0.7) + 0.3 * math.log(0.3)):.4f}")
print(f"loss after training: {loss:.4f}")
print(f"learned probability of 4 after 3: {model(torch.tensor([3])).softmax(-1)[0, 4]:.4f}")

# 3. In the demo's model one matrix serves at both ends.
demo = Transformer(ModelConfig.preset("demo"))
n_all, n_table = sum(p.numel() for p in demo.parameters()), demo.model.embed_tokens.weight.numel()
print(f"numbers in the table: {n_table:,}")
print(f"share of all parameters: {n_table / n_all:.4f}")
print(f"the output layer is the same tensor: {int(demo.lm_head.weight is demo.model.embed_tokens.weight)}")
