"""Chapter 20: what a position teaches with and without the teacher's probabilities, and what the divergences prefer."""

import math

import torch

from minillm.losses import distill_loss, linear_top_k_distill_loss, top_k_teacher

torch.set_num_threads(1)  # the tensors are small
torch.manual_seed(0)


def divergence_of(student, teacher, **settings):
    """Return the mean distillation loss of logits (n, V), without any cross-entropy."""
    loss_sum, n = distill_loss(student, teacher, torch.zeros(len(student), dtype=torch.long), **settings)
    return loss_sum / n


# 1. Black box: the teacher writes n tokens, the student counts them. White box: it sees the probabilities.
V, N_TOKENS, N_TRIALS = 11, 1000, 500
p = torch.tensor([0.2, *[0.08] * 10], dtype=torch.float64)
draws = torch.multinomial(p.expand(N_TRIALS, V), N_TOKENS, replacement=True)
counts = torch.zeros(N_TRIALS, V, dtype=torch.float64).scatter_add_(
    1, draws, torch.ones_like(draws, dtype=torch.float64)
)
teacher = p.log().expand(N_TRIALS, V)
print(f"(V - 1) / 2n: {(V - 1) / (2 * N_TOKENS):.5f}")
print(f"black box, divergence after {N_TOKENS} tokens, in mean: {divergence_of(counts.log(), teacher):.5f}")
print(f"white box, divergence after one position: {divergence_of(teacher, teacher):.5f}")

# 2. Temperature: T² keeps the gradient as large as that of the cross-entropy.
student, teacher = torch.randn(1, 50), torch.randn(1, 50)
centred = (student - student.mean()) - (teacher - teacher.mean())
for temperature in (1.0, 10.0, 100.0):
    logits = student.clone().requires_grad_()
    divergence_of(logits, teacher, temperature=temperature).backward()
    print(f"gradient with T = {temperature:.0f}: {logits.grad.norm():.4f}")
print(f"limit for large T: {centred.norm() / 50:.4f}")

# 3. A student with one bump learns a teacher with two, at 10 and 30.
places = torch.arange(41.0)
teacher = torch.logaddexp(-((places - 10) ** 2) / 8, -((places - 30) ** 2) / 8)[None]
for divergence in ("forward", "reverse"):
    middle, log_width = torch.tensor(14.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.Adam([middle, log_width], lr=0.1)
    for _ in range(1500):
        logits = (-((places - middle) ** 2) / (2 * log_width.exp() ** 2))[None]
        loss = divergence_of(logits, teacher, divergence=divergence)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q = logits.detach().softmax(-1)[0]
    mean = (q * places).sum()
    print(f"{divergence}, mean of the student: {mean:.2f}, width: {(q * (places - mean) ** 2).sum().sqrt():.2f}")
    print(f"{divergence}, loss left: {loss:.4f}")
print(f"ln 2: {math.log(2):.4f}")

# 4. The teacher's k best tokens, and one number for the rest: never more than the true divergence.
student, teacher = torch.randn(8, 50), 3 * torch.randn(8, 50)
targets = torch.zeros(8, dtype=torch.long)
for k in (1, 5, 20, 49):
    columns = top_k_teacher(teacher, None, targets, k=k)
    loss_sum, n = linear_top_k_distill_loss(student, None, *columns, targets)
    print(f"share of the divergence that {k} tokens show: {loss_sum / n / divergence_of(student, teacher):.4f}")
