"""Chapter 6: what RMSNorm keeps and removes, its gradient, a deep stack with and without it, and half precision."""

import torch

from minillm.model.norm import RMSNorm

torch.manual_seed(0)
D = 64
norm = RMSNorm(D, eps=1e-6)
x = 3 + 5 * torch.randn(4, D)


def rms(values: torch.Tensor) -> float:
    """Return the root of the mean square of all values."""
    return float(values.square().mean().sqrt())


# 1. The length becomes sqrt(D); the direction stays; the mean is not removed.
with torch.no_grad():
    y = norm(x)
    print(f"root mean square before: {rms(x):.4f}")
    print(f"root mean square after: {rms(y):.4f}")
    print(f"cosine of before and after: {torch.cosine_similarity(x, y).min():.4f}")
    print(f"change when x is ten times as large: {(norm(10 * x) - y).abs().max():.4f}")
    print(f"the mean is still there: {int(y.mean() > 0.3)}")
    print(f"norm of a zero vector: {norm(torch.zeros(D)).abs().max():.4f}")

# 2. The gradient has no part along x: a longer x changes nothing.
x.requires_grad_(True)
(norm(x) * torch.randn(4, D)).sum().backward()
print(f"cosine of x and its gradient: {torch.cosine_similarity(x, x.grad).abs().max():.4f}")

# 3. Thirty random layers that each double the signal, without and with a norm before each.
with torch.no_grad():
    plain = normed = torch.randn(256, D)
    for _ in range(30):
        weight = 2 * torch.randn(D, D) / D**0.5
        plain, normed = plain @ weight, norm(normed) @ weight
print(f"doublings after 30 layers without a norm: {torch.tensor(rms(plain)).log2():.2f}")
print(f"doublings after 30 layers with norms: {torch.tensor(rms(normed)).log2():.2f}")

# 4. float16 ends at 65,504: the square of 300 is beyond. So the norm computes in float32.
half = torch.full((D,), 300.0, dtype=torch.float16)
naive = half / half.square().mean().sqrt()
print(f"computed in float16: {naive[0]:.4f}")
print(f"computed by the library: {norm(half)[0]:.4f}")
