"""Exercises of chapter 13: a step of AdamW, a schedule, and clipping."""

import math

import pytest
import torch
from torch import nn

from minillm.training.schedule import schedule_factor
from tests.exercises.kit import exercise, find_the_bug


def library_step(weight, grad, m, v, *, step, lr, weight_decay, betas=(0.9, 0.95), eps=1e-8):
    parameter = nn.Parameter(weight.clone())
    parameter.grad = grad
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[parameter] = state
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def by_hand(
    weight, grad, m, v, *, step, lr, weight_decay, betas=(0.9, 0.95), eps=1e-8, decay="decoupled", corrects=True
):
    if decay == "gradient":
        grad = grad + weight_decay * weight
    m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    m_hat, v_hat = (m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)) if corrects else (m, v)
    kept = {"decoupled": 1 - lr * weight_decay, "without lr": 1 - weight_decay, "gradient": 1.0}[decay]
    return weight * kept - lr * m_hat / (v_hat.sqrt() + eps), m, v


def without_correction(*args, **settings):
    return by_hand(*args, **settings, corrects=False)


def decay_in_the_gradient(*args, **settings):
    return by_hand(*args, **settings, decay="gradient")


def decay_without_rate(*args, **settings):
    return by_hand(*args, **settings, decay="without lr")


def decay_last(weight, *rest, lr, weight_decay, **settings):
    moved, m, v = by_hand(weight, *rest, lr=lr, weight_decay=0.0, **settings)
    return moved * (1 - lr * weight_decay), m, v


def returns_corrected(*args, step, **settings):
    weight, m, v = by_hand(*args, step=step, **settings)
    return weight, m / (1 - 0.9**step), v / (1 - 0.95**step)


@exercise(
    "ch13_adamw",
    solution=library_step,
    wrong={
        "no bias correction": (without_correction, "bias correction"),
        "decay through the gradient": (decay_in_the_gradient, "beside the update"),
        "decay without the learning rate": (decay_without_rate, "beside the update"),
        "decay after the update": (decay_last, "before the update"),
        "corrected averages are kept": (returns_corrected, "uncorrected"),
    },
)
def test_adamw_step(candidate):
    zero = torch.zeros(1, dtype=torch.float64)
    first = candidate(zero.clone(), zero + 1000, zero.clone(), zero.clone(), step=1, lr=0.01, weight_decay=0.0)[0]
    assert float(first) == pytest.approx(-0.01), "the first step is the learning rate: mind the bias correction"
    decayed = candidate(zero + 1, zero.clone(), zero.clone(), zero.clone(), step=1, lr=0.01, weight_decay=0.1)[0]
    assert float(decayed) == pytest.approx(0.999), "decay multiplies by 1 - lr * weight_decay, beside the update"
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    yours, reference = ((weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)) for _ in range(2))
    for number, gradient in enumerate(gradients, start=1):
        settings = {"step": number, "lr": 0.02, "weight_decay": 0.3}
        yours = candidate(yours[0], gradient, *yours[1:], **settings)
        reference = library_step(reference[0], gradient, *reference[1:], **settings)
        for name, mine, right in zip(("weight", "m", "v"), yours, reference, strict=True):
            message = f"{name} after update {number}: "
            message += "decay comes before the update" if name == "weight" else "m and v are returned uncorrected"
            assert torch.allclose(mine, right, rtol=1e-6), message


def library_cosine(step, *, total_steps, warmup_steps, min_ratio):
    return schedule_factor("cosine", total_steps=total_steps, warmup_steps=warmup_steps, min_ratio=min_ratio)(step)


def cosine(progress, min_ratio):
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def starts_at_zero(step, *, total_steps, warmup_steps, min_ratio):
    if step < warmup_steps:
        return step / warmup_steps
    return library_cosine(step, total_steps=total_steps, warmup_steps=warmup_steps, min_ratio=min_ratio)


def never_arrives(step, *, total_steps, warmup_steps, min_ratio):
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return cosine((step - warmup_steps) / (total_steps - warmup_steps), min_ratio)


def ignores_warmup(step, *, total_steps, warmup_steps, min_ratio):
    return (step + 1) / warmup_steps if step < warmup_steps else cosine(step / (total_steps - 1), min_ratio)


def floor_by_max(step, *, min_ratio, **lengths):
    return max(min_ratio, library_cosine(step, min_ratio=0.0, **lengths))


@exercise(
    "ch13_schedule",
    solution=library_cosine,
    wrong={
        "first update lost": (starts_at_zero, "first update"),
        "last update too early": (never_arrives, "last update"),
        "progress from update 0": (ignores_warmup, "after the warm-up"),
        "cut off at the floor": (floor_by_max, "half way"),
    },
)
def test_cosine_factor(candidate):
    settings = {"total_steps": 25, "warmup_steps": 4, "min_ratio": 0.2}
    assert candidate(0, **settings) == pytest.approx(0.25), "the first update uses 1 / warmup_steps, not 0"
    assert candidate(4, **settings) == pytest.approx(1.0), "progress is 0 in the first update after the warm-up"
    assert candidate(24, **settings) == pytest.approx(0.2), "the last update, total_steps - 1, reaches min_ratio"
    assert candidate(14, **settings) == pytest.approx(0.6), "half way it is half way between 1 and min_ratio"
    assert candidate(0, total_steps=9, warmup_steps=0, min_ratio=0.0) == pytest.approx(1.0), (
        "without a warm-up the first update has the factor 1"
    )


def library_clip(gradients, max_norm):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, max_norm)
    return [parameter.grad for parameter in parameters]


def finder(clip):
    small = [torch.tensor([0.03]), torch.tensor([[0.04]])]
    assert all(map(torch.equal, clip(small, 1.0), small)), "a gradient below the limit stays as it is"


def large_gradients(clip):
    clipped = clip([torch.tensor([3.0]), torch.tensor([[4.0]])], 1.0)
    assert torch.allclose(clipped[0], torch.tensor([0.6]), atol=1e-4)


def keeps_direction(clip):
    clipped = clip([torch.tensor([0.3]), torch.tensor([0.4])], 1.0)
    assert float(clipped[0] / clipped[1]) == pytest.approx(0.75, abs=1e-4)


def each_tensor_alone(clip):
    clipped = clip([torch.tensor([3.0]), torch.tensor([4.0])], 1.0)
    assert float(clipped[0]) == pytest.approx(1.0), "expects every tensor to have its own norm"


test_find_the_bug = find_the_bug(
    "ch13_bug",
    right=library_clip,
    finder=finder,
    hint="it hides while the norm is above the limit",
    wrong={
        "large gradients hide it": large_gradients,
        "the direction is right": keeps_direction,
        "a norm per tensor": each_tensor_alone,
    },
)
