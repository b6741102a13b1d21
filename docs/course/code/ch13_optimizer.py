"""Chapter 13: the size of an AdamW step, weight decay, the learning rate over time, and a spike that clipping stops."""

import torch
from torch import nn

from minillm.training.optim import adamw
from minillm.training.schedule import schedule_factor

LR = 0.01

# 1. The first step has the size of the learning rate, whatever the size of the gradient.
for gradient in (0.001, 1000.0):
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.item()
    layer.weight.grad = torch.full((1, 1), gradient)
    adamw(layer, learning_rate=LR, weight_decay=0.0).step()
    print(f"first step / learning rate, gradient {gradient:g}: {(before - layer.weight.item()) / LR:.4f}")
print(f"the same without bias correction: {(1 - 0.9) / (1 - 0.95) ** 0.5:.4f}")

# 2. Ten updates without a gradient: only decay moves the weight. The scale of a norm is left out.
layer = nn.Sequential(nn.Linear(1, 1, bias=False), nn.RMSNorm(1))
nn.init.ones_(layer[0].weight)
optimizer = adamw(layer, learning_rate=LR, weight_decay=0.1)
for _ in range(10):
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
print(f"matrix after 10 updates of decay alone: {layer[0].weight.item():.5f}")
print(f"scale of the norm: {layer[1].weight.item():.5f}")
weight = torch.ones(1, requires_grad=True)
optimizer = torch.optim.Adam([weight], lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
for _ in range(10):
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
print(f"the same decay, added to the gradient: {weight.item():.5f}")

# 3. The learning rate of 100 updates, as a share of its peak.
cosine = schedule_factor("cosine", total_steps=100, warmup_steps=10, min_ratio=0.1)
wsd = schedule_factor("wsd", total_steps=100, decay_ratio=0.2)
print(f"cosine, first update: {cosine(0):.4f}")
print(f"cosine, after the warm-up: {cosine(10):.4f}")
print(f"cosine, last update: {cosine(99):.4f}")
print(f"wsd, update 80: {wsd(79):.4f}")
print(f"wsd, update 90: {wsd(89):.4f}")

# 4. One gradient of 1000 among ones: how large is the step 40 updates later, with and without clipping?
for max_norm in (0.0, 1.0):
    layer = nn.Linear(1, 1, bias=False)
    optimizer = adamw(layer, learning_rate=LR, weight_decay=0.0)
    for update in range(141):
        before = layer.weight.item()
        layer.weight.grad = torch.full((1, 1), 1000.0 if update == 100 else 1.0)
        nn.utils.clip_grad_norm_(layer.parameters(), max_norm or float("inf"))
        optimizer.step()
    size = (before - layer.weight.item()) / LR
    print(f"step / learning rate 40 updates after a spike, max_norm {max_norm:g}: {size:.4f}")
