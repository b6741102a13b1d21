"""Chapter 18: LoRA learns the best matrix of its rank, and the famous 200 : 1 of its gradients, measured."""

import torch
from torch import nn

from minillm.lora import apply_lora, lora_parameters, merge_lora, unmerge_lora
from minillm.lora.more.monitor import Monitor

torch.set_num_threads(1)  # the matrices are small
torch.manual_seed(0)
N_OUT, N_IN, WANTED = 48, 64, torch.tensor([4.0, 3.0, 2.0, 1.0])

# What fine-tuning would have to change: a matrix of rank 4 with the singular values 4, 3, 2, 1.
u, v = torch.linalg.qr(torch.randn(N_OUT, 4))[0], torch.linalg.qr(torch.randn(N_IN, 4))[0]
change = u @ torch.diag(WANTED) @ v.T  # (out, in)
base = torch.randn(N_OUT, N_IN)
inputs = torch.eye(N_IN)  # so the squared error of the outputs is that of the matrix


def adapt(*, rank: int, alpha: float = 16.0, init: str = "kaiming") -> nn.Sequential:
    """Return a model of one frozen linear layer with an adapter."""
    model = nn.Sequential(nn.Linear(N_IN, N_OUT, bias=False))
    model[0].weight.data.copy_(base)
    apply_lora(model, rank=rank, alpha=alpha, init=init, generator=torch.Generator().manual_seed(1))
    return model


def train(model: nn.Sequential, *, n_steps: int, learning_rate: float, interval: int = 500) -> tuple[float, dict]:
    """Return the error of the last step, and the monitor's figures of every ``interval`` steps and the first."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    monitor, rows = Monitor(model, interval=interval), {}
    for step in range(1, n_steps + 1):
        error = (model(inputs) - inputs @ (base + change).T).square().sum()
        optimizer.zero_grad()
        error.backward()
        monitor.before_update(step)
        optimizer.step()
        schedule.step()
        if row := monitor.after_update(step, optimizer):
            rows[step] = row["layers"]["0"]
    return error.item(), rows


# 1. The size of an adapter.
model = adapt(rank=4)
print(f"trained numbers: {sum(p.numel() for p in lora_parameters(model))} of {base.numel()}")

# 2. What a rank can reach: the sum of the squared singular values that are left over.
for rank in (1, 2, 4):
    error, rows = train(adapt(rank=rank), n_steps=500, learning_rate=0.02)
    print(f"error left with rank {rank}: {error:.4f}")
print(f"effective rank: {rows[500]['effective_rank']:.4f}")

# 3. alpha: after one step the change is proportional to alpha / rank.
small, large = adapt(rank=4, alpha=16.0), adapt(rank=4, alpha=32.0)
for model in (small, large):
    train(model, n_steps=1, learning_rate=1e-3)
sizes = [model[0].lora.delta(model[0]).norm() for model in (small, large)]
print(f"change with twice the alpha: {sizes[1] / sizes[0]:.4f}")

# 4. B : A, the sizes of the gradients, from a start at zero; and an orthogonal B.
for rate in (1e-4, 1e-3):
    _, rows = train(adapt(rank=4), n_steps=100, learning_rate=rate, interval=2)
    print(f"rate {rate}, A's gradient at step 1: {rows[1]['grad_norm_A']}")
    for step in (2, 10, 100):
        print(f"rate {rate}, B : A at step {step}: {rows[step]['grad_ratio']:.2f}")
for init in ("kaiming", "orthogonal"):
    error, _ = train(adapt(rank=4, init=init), n_steps=500, learning_rate=0.02)
    print(f"error left from a start with {init}: {error:.4f}")

# 5. Merged, the model computes the same, and unmerge gives W back to the last bit.
model = adapt(rank=4)
train(model, n_steps=100, learning_rate=0.02)
before = model(inputs)
merge_lora(model)
print(f"merging changes the outputs by: {(model(inputs) - before).abs().max():.6f}")
unmerge_lora(model)
print(f"after unmerging the weights differ in: {(model[0].weight != base).sum()} places")
