"""Chapter 14: what bfloat16 cannot add, what float16 cannot hold, and how a loss scale finds its size."""

import torch
from torch import nn

from minillm import precision

CPU = torch.device("cpu")

# 1. The dead zone at 1: the largest power of two that may be added without changing anything.
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    one = torch.ones((), dtype=dtype)
    lost = next(2.0**-k for k in range(30) if one + torch.tensor(2.0**-k, dtype=dtype) == one)
    print(f"dead zone at 1, {str(dtype).removeprefix('torch.')}: {lost:.4e}")

# 2. A thousand updates of 0.001, on a weight in bfloat16 and on a master weight in float32.
for dtype in (torch.bfloat16, torch.float32):
    weight = torch.ones((), dtype=dtype)
    for _ in range(1000):
        weight += 0.001
    print(f"1 + 1000 times 0.001, {str(dtype).removeprefix('torch.')}: {weight.item():.3f}")

# 3. New weights N(0, 0.02²) in bfloat16, and one step of AdamW: how many of them stay where they are?
torch.manual_seed(0)
weights = (0.02 * torch.randn(1_000_000)).bfloat16()
for learning_rate in (1e-3, 1e-4, 1e-5):
    step = learning_rate * torch.randn(1_000_000).sign()
    unchanged = (weights.float() - step).bfloat16() == weights
    print(f"weights that a step of {learning_rate:.0e} does not move: {unchanged.float().mean():.4f}")

# 4. Mixed precision: the weight is float32, the product is not.
layer = nn.Linear(8, 8)
with precision.autocast(CPU, torch.bfloat16):
    output = layer(torch.randn(2, 8))
print(f"bits of the weight: {layer.weight.element_size() * 8}, bits of the output: {output.element_size() * 8}")

# 5. A gradient of 1e-8 in float16, as it is and scaled by 65,536.
gradient = torch.tensor(1e-8)
print(f"1e-8 in float16: {gradient.half().item():.2e}")
print(f"1e-8, scaled, in float16, unscaled: {(gradient * 65536).half().float().item() / 65536:.2e}")

# 6. The scaler: an ordinary update with a norm before and after unscaling, then one with an overflow.
weight = nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.5)
scaler = precision.grad_scaler(CPU, torch.float16)
scaler.scale(weight.sum()).backward()
print(f"gradient before unscale_: {weight.grad.item():.1f}")
scaler.unscale_(optimizer)
print(f"gradient after unscale_: {weight.grad.item():.1f}")
scaler.step(optimizer)
scaler.update()
optimizer.zero_grad()
print(f"weight after the update: {weight.item():.2f}")
scaler.scale(weight.sum() * float("inf")).backward()
scaler.step(optimizer)
scaler.update()
print(f"weight after an overflow: {weight.item():.2f}")
print(f"loss scale after an overflow: {scaler.get_scale():.0f}")
