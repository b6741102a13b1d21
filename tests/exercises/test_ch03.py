"""Exercises of chapter 3: the table, the floor of the smallest model, and one matrix at both ends."""

import math

import pytest
import torch
from torch import nn

from tests.exercises.kit import exercise, find_the_bug


def library_gradient(ids, grad, vocab_size):
    table = nn.Embedding(vocab_size, grad.shape[1])
    table(ids).backward(grad)
    return table.weight.grad


def overwritten(ids, grad, vocab_size):
    result = torch.zeros(vocab_size, grad.shape[1])
    result[ids] += grad
    return result


def averaged(ids, grad, vocab_size):
    return library_gradient(ids, grad, vocab_size) / ids.bincount(minlength=vocab_size).clamp(min=1)[:, None]


def for_all_rows(ids, grad, vocab_size):
    return grad.sum(0).expand(vocab_size, -1)


@exercise(
    "ch03_gradient",
    solution=library_gradient,
    wrong={
        "table[ids] += grad": (overwritten, "only one of equal ids"),
        "mean": (averaged, "added, not averaged"),
        "every row": (for_all_rows, "did not occur"),
    },
)
def test_table_gradient(candidate):
    ids, grad = torch.tensor([4, 1, 4, 4]), torch.arange(1.0, 9.0).view(4, 2)
    found = candidate(ids, grad, 6)
    assert found.shape == (6, 2), "the table has a row for each token of the vocabulary: (V, D)"
    assert not found[[0, 2, 3, 5]].any(), "rows of tokens that did not occur have the gradient 0"
    assert torch.allclose(found[1], grad[1]), "a token that occurs once has the gradient of its position"
    assert not torch.allclose(found[4], grad[3]), "result[ids] += grad keeps only one of equal ids"
    total = grad[[0, 2, 3]].sum(0)
    assert torch.allclose(found[4], total), (
        "the gradients of a token that occurs more than once are added, not averaged"
    )


def right_entropy(counts):
    joint = counts.double() / counts.sum()
    return float(torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum())


def rows_of(counts):
    return counts.double() / counts.sum(1, keepdim=True).clamp(min=1)


@exercise(
    "ch03_entropy",
    solution=right_entropy,
    wrong={
        "joint": (lambda counts: float(torch.special.entr(counts / counts.sum()).sum()), "given the first"),
        "without context": (
            lambda counts: float(torch.special.entr(counts.sum(0) / counts.sum()).sum()),
            "given the first",
        ),
        "plain mean of rows": (lambda counts: float(torch.special.entr(rows_of(counts)).sum(1).mean()), "weighted"),
        "bits": (lambda counts: right_entropy(counts) / math.log(2), "nats"),
        "0 · ln 0": (lambda counts: float(-(counts / counts.sum() * rows_of(counts).log()).sum()), "never follow"),
    },
)
def test_conditional_entropy(candidate):
    even = float(candidate(torch.full((2, 2), 4)))
    assert even != pytest.approx(math.log(4)), "given the first token only the second is unknown: not the pair"
    assert even != pytest.approx(1.0), "an even choice of two has ln 2 nats; 1 would be bits"
    assert even == pytest.approx(math.log(2)), "each token is followed by one of two, equally often: ln 2 nats"
    certain = float(candidate(torch.tensor([[0, 5], [5, 0]])))
    assert not math.isnan(certain), "tokens that never follow add nothing: 0 · ln 0 is 0, not nan"
    assert certain == pytest.approx(0, abs=1e-6), "given the first token the second is certain here: 0 nats"
    ragged = torch.tensor([[8, 8, 0], [1, 0, 0], [0, 0, 0]])
    found = float(candidate(ragged))
    assert not math.isnan(found), "a token that never occurs has a row of zeros, and 0 / 0 is nan: it adds nothing"
    assert found == pytest.approx(16 / 17 * math.log(2), abs=1e-6), "rows are weighted by how often their token occurs"


def right_tie(embedding, head):
    head.weight = embedding.weight


def tied(tie):
    torch.manual_seed(0)
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    tie(embedding, head)
    return embedding, head


def finder(tie):
    embedding, head = tied(tie)
    with torch.no_grad():
        embedding.weight[2] += 1  # as an update does
    assert torch.equal(embedding.weight, head.weight)


def equal_values(tie):
    embedding, head = tied(tie)
    assert torch.equal(embedding.weight, head.weight)


def same_shape(tie):
    embedding, head = tied(tie)
    assert embedding.weight.shape == head.weight.shape


def different_tensors(tie):
    embedding, head = tied(tie)
    assert embedding.weight is not head.weight


test_find_the_bug = find_the_bug(
    "ch03_bug",
    right=right_tie,
    finder=finder,
    wrong={"equal values": equal_values, "same shape": same_shape, "expects a copy": different_tensors},
    hint="it hides until one of the two changes, as in an update",
)
