"""Exercises of chapter 20: the softened divergence, the k best tokens, and a divergence the wrong way round."""

import math

import pytest
import torch

from minillm.losses import distill_loss, linear_top_k_distill_loss, top_k_teacher
from tests.exercises.kit import exercise, find_the_bug


def by_library(student, teacher, temperature):
    target = torch.zeros(1, dtype=torch.long)
    pairs = zip(student, teacher, strict=True)
    return torch.stack([distill_loss(s[None], t[None], target, temperature=temperature)[0] for s, t in pairs])


def softened(student, teacher, temperature):
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


def without_square(student, teacher, temperature):
    return by_library(student, teacher, temperature) / temperature**2


def reversed_sides(student, teacher, temperature):
    return by_library(teacher, student, temperature)


def cross_entropy_alone(student, teacher, temperature):
    q, p = softened(student, teacher, temperature)
    return -(temperature**2) * (p.exp() * q).sum(-1)


def teacher_alone_softened(student, teacher, temperature):
    q, p = softened(student, teacher, temperature)[1], student.log_softmax(-1)
    return temperature**2 * (q.exp() * (q - p)).sum(-1)


@exercise(
    "ch20_divergence",
    solution=by_library,
    wrong={
        "without T²": (without_square, "T²"),
        "reverse": (reversed_sides, "teacher's probabilities weigh"),
        "cross-entropy": (cross_entropy_alone, "equal models"),
        "student not softened": (teacher_alone_softened, "equal models"),
        "mean": (lambda *args: by_library(*args).mean(), "one number per position"),
    },
)
def test_soft_loss(candidate):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    for temperature in (1.0, 4.0):
        losses = candidate(student, teacher, temperature)
        assert tuple(losses.shape) == (3,), "return one number per position"
        same = candidate(teacher, teacher, temperature)
        assert same.abs().max() < 1e-5, "between equal models the divergence is 0: soften both, subtract the entropy"
        q, p = softened(student, teacher, temperature)
        expected = (p.exp() * (p - q)).sum(-1)
        reverse = temperature**2 * (q.exp() * (q - p)).sum(-1)
        assert not torch.allclose(losses, reverse, rtol=1e-4), "the teacher's probabilities weigh, not the student's"
        is_unscaled = temperature != 1 and torch.allclose(losses, expected, rtol=1e-4)
        assert not is_unscaled, "multiply by T², or the gradient shrinks with T"
        assert torch.allclose(losses, temperature**2 * expected, rtol=1e-4, atol=1e-6), (
            "another number: in nats, summed over the tokens of a position"
        )


def top_k_by_library(teacher, student, k):
    targets = torch.zeros(1, dtype=torch.long)
    columns = top_k_teacher(teacher.log()[None], None, targets, k=k)
    return float(linear_top_k_distill_loss(student.log()[None], None, *columns, targets)[0])


def kl(p, q):
    return float((p * (p / q).log()).sum())


def best_of(teacher, student, k):
    best = teacher.topk(k).indices
    return teacher[best], student[best]


def without_rest(teacher, student, k):
    return kl(*best_of(teacher, student, k))


def normalised(teacher, student, k):
    p, q = best_of(teacher, student, k)
    return kl(p / p.sum(), q / q.sum())


def own_best(teacher, student, k):
    p, q = teacher.topk(k).values, student.topk(k).values
    return kl(torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]]))


def student_best(teacher, student, k):
    best = student.topk(k).indices
    p, q = teacher[best], student[best]
    return kl(torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]]))


@exercise(
    "ch20_top_k",
    solution=top_k_by_library,
    wrong={
        "without the rest": (without_rest, "rest"),
        "normalised": (normalised, "rest"),
        "each its own best": (own_best, "same tokens"),
        "the student's best": (student_best, "teacher's best"),
    },
)
def test_top_k_divergence(candidate):
    teacher = torch.tensor([0.5, 0.3, 0.1, 0.1], dtype=torch.float64)
    student = torch.tensor([0.1, 0.2, 0.6, 0.1], dtype=torch.float64)
    flat = torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64)
    assert float(candidate(teacher, flat, 1)) == pytest.approx(0, abs=1e-9), "0.5 and a rest of 0.5 on both sides"
    assert float(candidate(teacher, student, 2)) != pytest.approx(student_best(teacher, student, 2)), (
        "the teacher's best tokens are chosen, not the student's best"
    )
    assert float(candidate(teacher, student, 2)) != pytest.approx(own_best(teacher, student, 2)), (
        "compare the same tokens: those that are the teacher's best"
    )
    expected = kl(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.2, 0.7]))
    assert float(candidate(teacher, student, 2)) == pytest.approx(expected, rel=1e-5), "the rest is a token of its own"
    assert float(candidate(teacher, student, 3)) == pytest.approx(kl(teacher, student), rel=1e-5), (
        "with k = V - 1 nothing is merged: the rest is one token, and the divergence is whole"
    )


def right(student_logits, teacher_logits):
    return by_library(student_logits, teacher_logits, 1.0)


def finder(forward_divergence):
    teacher, student = torch.tensor([[0.0, 0.0, -30.0]]), torch.tensor([[0.0, -10.0, -30.0]])
    assert forward_divergence(student, teacher) > 4, "a student that leaves out half of the teacher pays for it"


def equal_models(forward_divergence):
    assert forward_divergence(torch.ones(1, 4), torch.ones(1, 4)).abs().max() < 1e-6, "equal models hide it"


def never_negative(forward_divergence):
    torch.manual_seed(0)
    assert (forward_divergence(torch.randn(5, 4), torch.randn(5, 4)) >= 0).all(), "both ways are positive"


def mirrored(forward_divergence):
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    expected = (1 - 2 / (1 + math.e)) * 1.0
    assert float(forward_divergence(one, two)) == pytest.approx(expected, rel=1e-4), "mirror images hide it"


def symmetric(forward_divergence):
    one, two = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert float(forward_divergence(one, two)) == pytest.approx(float(forward_divergence(two, one))), "not symmetric"


test_find_the_bug = find_the_bug(
    "ch20_bug",
    right=right,
    finder=finder,
    hint="it hides between equal models, between mirror images, and in the sign",
    wrong={
        "equal models": equal_models,
        "never negative": never_negative,
        "mirror images": mirrored,
        "symmetric": symmetric,
    },
)
