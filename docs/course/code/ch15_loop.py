"""Chapter 15: one step cut in three ways, the gradient of a mean of means, and the bytes of a rank under ZeRO."""

import torch

from minillm.config import ModelConfig
from minillm.losses import cross_entropy
from minillm.model import Transformer
from minillm.plan.engines import zero_bytes

torch.manual_seed(0)
model = Transformer(ModelConfig.preset("demo", num_hidden_layers=1)).double()
ids = torch.randint(1024, (8, 17))
inputs, targets = ids[:, :-1], ids[:, 1:].clone()
targets[:6, 2:] = -100  # six short answers of 2 targets, two long ones of 16


def gradient(micro_batches, *, divides_itself=False):
    """Return the gradient of a step, (N,): micro-batches of row numbers, backward after each."""
    model.zero_grad()
    n_step = (targets != -100).sum()
    for rows in micro_batches:
        loss_sum, n_targets = cross_entropy(model(inputs[rows]), targets[rows])
        loss = loss_sum / n_targets / len(micro_batches) if divides_itself else loss_sum / n_step
        loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


whole = gradient([range(8)])
by_two = gradient([[0, 1], [2, 3], [4, 5], [6, 7]])
print(f"targets of the step: {(targets != -100).sum()}")
print(f"relative difference, four micro-batches: {(by_two - whole).norm() / whole.norm():.1e}")

# Two ranks: each adds up its own share; DDP averages, so each multiplies its loss by the number of ranks before.
ranks = [torch.zeros_like(whole), torch.zeros_like(whole)]
for rank, mine in enumerate(([[0, 2], [4, 6]], [[1, 3], [5, 7]])):
    ranks[rank] = 2 * gradient(mine)
print(f"relative difference, two ranks: {(sum(ranks) / 2 - whole).norm() / whole.norm():.1e}")

wrong = gradient([[0, 1], [2, 3], [4, 5], [6, 7]], divides_itself=True)
print(f"relative difference, mean of the means: {(wrong - whole).norm() / whole.norm():.2f}")
print(f"weight of a target in a short micro-batch: {(1 / 4 / 4) / (1 / 44):.2f}")
print(f"weight of a target in a long micro-batch: {(1 / 32 / 4) / (1 / 44):.2f}")

# 7.5 billion parameters on 64 GPUs: 2 bytes for a weight, 2 for its gradient, 12 for the optimizer.
for stage in range(4):
    print(f"ZeRO {stage}: {zero_bytes(7.5e9, stage=stage, ranks=64) / 1e9:.1f} GB per GPU")
