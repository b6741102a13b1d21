"""Chapter 29: FLOPs, hours and price of a run, and how a budget is divided. Argument: your price of a GPU-hour."""

import sys

from minillm.config import ModelConfig
from minillm.plan.flops import chinchilla_tokens, count_flops, hours
from minillm.plan.gpus import find_gpu
from minillm.plan.parameters import count_parameters, meta_model

price = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0

# 1. The 26M model on 20 tokens per parameter.
model = meta_model(ModelConfig.preset("small"))
N = count_parameters(model).total
D = chinchilla_tokens(N)
flops = count_flops(model, 512)
print(f"parameters: {N:,}")
print(f"tokens: {D:,.0f}")
print(f"FLOPs by 6ND: {6 * N * D:.3e}")
print(f"FLOPs by the planner: {flops.training * D:.3e}")
print(f"planner / 6ND: {flops.training / (6 * N):.4f}")
for name in ("T4", "4090", "A100-80", "H100"):
    gpu = find_gpu(name)
    n_hours = hours(flops, D, peak=gpu.half_peak, mfu=0.35)
    print(f"{name}, if MFU were 35 %: {n_hours:.3f} hours, price {n_hours * price:.3f}")
eight = hours(flops, D, peak=find_gpu("A100-80").half_peak, mfu=0.35, ranks=8)
print(f"eight A100-80: {eight:.4f} hours, price {eight * 8 * price:.3f}")

# 2. Batch and rate for this budget, by the fit of DeepSeek LLM (2024).
C = 6 * N * D
batch, rate = 0.2920 * C**0.3271, 0.3118 * C**-0.1250
print(f"tokens per update: {batch:,.0f}, so {D / batch:,.0f} updates; learning rate: {rate:.2e}")

# 3. A budget of 1e20 FLOPs, divided by the loss that was fitted to Chinchilla's runs (Besiroglu et al. 2024).
A, ALPHA, B, BETA, E = 482.01, 0.3478, 2085.43, 0.3658, 1.8172


def loss(n: float, d: float) -> float:
    """Return the nats per token of n parameters after d tokens."""
    return E + A / n**ALPHA + B / d**BETA


def best_split(c: float) -> tuple[float, float]:
    """Return (parameters, tokens) of the least loss for c FLOPs."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    n = g * (c / 6) ** (BETA / (ALPHA + BETA))
    return n, c / (6 * n)


C = 1e20
best_n, best_d = best_split(C)
tried_n = min((1e7 * 1.01**k for k in range(1000)), key=lambda n: loss(n, C / (6 * n)))
print(f"best parameters by the formula: {best_n:.3e}")
print(f"best parameters by trying: {tried_n:.3e}")
print(f"tokens per parameter: {best_d / best_n:.1f}")
print(f"parameters by the rule of 20: {(C / 120) ** 0.5:.3e}")
print(f"twice the budget, parameters times: {best_split(2 * C)[0] / best_n:.4f}")
for factor in (0.5, 0.25):
    extra = loss(best_n * factor, best_d / factor) - loss(best_n, best_d)
    print(f"the same FLOPs with {factor} of the parameters: loss {extra:+.4f}")

# 4. The same loss from half the parameters: trained longer, and half as expensive for everyone who uses it.
small_n = best_n / 2
small_d = (B / (loss(best_n, best_d) - E - A / small_n**ALPHA)) ** (1 / BETA)
longer = small_n * small_d / (best_n * best_d)
saved_per_token = 2 * (best_n - small_n)
answered = (longer - 1) * C / saved_per_token
print(f"half the parameters need tokens times: {small_d / best_d:.3f}")
print(f"their tokens per parameter: {small_d / small_n:.1f}")
print(f"their training FLOPs times: {longer:.3f}")
print(f"cheaper after so many answered tokens: {answered:.2e}")
