"""Chapter 10: the width of a gated layer, and what a gate can do that a ReLU cannot: multiply."""

import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.model.mlp import MLP

torch.set_num_threads(1)  # the matrices are small: more threads would wait for one another

# 1. Three matrices of width 8D/3 instead of two of width 4D.
config = ModelConfig.preset("small")  # D = 512
n_gated = sum(p.numel() for p in MLP(config).parameters())
n_plain = 2 * config.hidden_size * 4 * config.hidden_size
print(f"width: {config.intermediate_size}")
print(f"parameters, gated: {n_gated}")
print(f"parameters, two matrices of 4D: {n_plain}")

# 2. Two hidden units that multiply: silu(a) · b - silu(-a) · b = a · b, for all numbers.
mlp = MLP(ModelConfig(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, intermediate_size=2))
with torch.no_grad():
    mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # a, -a
    mlp.up_proj.weight.copy_(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))  # b, b
    mlp.down_proj.weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))  # their difference, into the first number
    print(f"3 times -2 by SwiGLU: {float(mlp(torch.tensor([3.0, -2.0]))[0]):.3f}")
    print(f"30 times -20 by SwiGLU: {float(mlp(torch.tensor([30.0, -20.0]))[0]):.3f}")

# 3. A ReLU layer of 64 units, with biases, learns to multiply numbers from -3 to 3.
torch.manual_seed(0)
relu = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 1))
optimizer = torch.optim.Adam(relu.parameters(), lr=1e-2)
for _ in range(1500):
    x = 6 * torch.rand(256, 2) - 3  # (B, 2)
    loss = (relu(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    x = 6 * torch.rand(10_000, 2) - 3
    for name, scale in (("where it was trained", 1), ("at ten times that", 10)):
        product = scale**2 * x[:, 0] * x[:, 1]
        error = (relu(scale * x)[:, 0] - product).square().mean().sqrt() / product.square().mean().sqrt()
        print(f"relative error of ReLU {name}: {error:.3f}")
