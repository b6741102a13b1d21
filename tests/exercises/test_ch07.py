"""Exercises of chapter 7: causal attention, the mask of a packed row, and a mask in the wrong corner."""

import torch
import torch.nn.functional as F

from minillm.model.attention_plan import AttentionPlan, attend, document_mask
from tests.exercises.kit import exercise, find_the_bug


def library_attention(q, k, v):
    return attend(q, k, v, AttentionPlan(is_causal=True))


def by_hand(q, k, v, *, scale=None, dim=-1, masks="scores"):
    scores = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5 if scale is None else scale)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if masks == "scores":
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=dim)
    return (weights * visible if masks == "weights" else weights) @ v


def over_queries(q, k, v):
    return by_hand(q, k, v, dim=-2)


@exercise(
    "ch07_attention",
    solution=library_attention,
    wrong={
        "no mask": (lambda q, k, v: by_hand(q, k, v, masks="nothing"), "comes later"),
        "mask after the softmax": (lambda q, k, v: by_hand(q, k, v, masks="weights"), "add up to 1"),
        "softmax over the queries": (over_queries, "add up to 1"),
        "not divided": (lambda q, k, v: by_hand(q, k, v, scale=1.0), "square root of the width"),
        "divided by the width": (lambda q, k, v: by_hand(q, k, v, scale=q.shape[-1]), "square root of the width"),
    },
)
def test_attention(candidate):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 6)  # each (B, H, T, K)
    changed = v.clone()
    changed[:, :, 3:] += 7
    before, after = candidate(q, k, v), candidate(q, k, changed)
    assert before.shape == q.shape, "the result has the shape of the queries, (B, H, T, K)"
    assert torch.allclose(before[:, :, :3], after[:, :, :3]), "a value that comes later must not change a result"
    ones = candidate(q, k, torch.ones_like(v))
    assert torch.allclose(ones, torch.ones_like(v)), (
        "the weights of a query's keys add up to 1: mask the scores, then softmax over the keys"
    )
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(before, expected, atol=1e-5), "the scores are divided by the square root of the width K"


def unmasked_padding(ids):
    same = ids[:, :, None] == ids[:, None, :]
    return same.tril()[:, None]


def blind_padding(ids):
    return ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).tril()[:, None]


def not_causal(ids):
    itself = torch.eye(ids.shape[1], dtype=torch.bool)
    return (((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]) | itself)[:, None]


def causal_only(ids):
    return torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)


@exercise(
    "ch07_mask",
    solution=document_mask,
    wrong={
        "documents see each other": (causal_only, "another document"),
        "not causal": (not_causal, "come later"),
        "padding sees nothing": (blind_padding, "no key at all"),
        "padding is a document": (unmasked_padding, "sees itself alone"),
        "transposed": (lambda ids: document_mask(ids).transpose(-1, -2), "come later"),
    },
)
def test_mask_of_documents(candidate):
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, -1], [4, 4, 4, 4, 4, 4, 4]])
    mask = candidate(ids)
    assert mask.shape == (2, 1, 7, 7), "one mask per row, the same for all heads: (B, 1, T, T)"
    assert not mask[0, 0, 2:5, :2].any(), "a query must not see another document of its row"
    assert not mask[1, 0].triu(1).any(), "a query must not see keys that come later; queries are the third dimension"
    assert mask.any(dim=-1).all(), "a query sees no key at all: its softmax is 0 / 0"
    assert mask[0, 0, 6].tolist() == [False] * 6 + [True], "padding sees itself alone"
    assert mask[1, 0].tril().sum() == 28, "a document that fills the row is an ordinary causal mask"
    assert mask[0, 0, 4].tolist() == [False, False, True, True, True, False, False]


def right_attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, H, T, S)
    n_queries, n_keys = scores.shape[-2:]
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    return scores.masked_fill(~visible, float("-inf")).softmax(dim=-1) @ v


def numbers(n_queries: int, n_keys: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, n, 4, generator=generator) for n in (n_queries, n_keys, n_keys))


def finder(attention):
    q, k, v = numbers(6, 6)
    whole = attention(q, k, v)
    assert torch.allclose(attention(q[:, :, 4:], k, v), whole[:, :, 4:], atol=1e-6), "the last two of six positions"


def whole_text(attention):
    q, k, v = numbers(6, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attention(q, k, v), expected, atol=1e-6), "as many queries as keys hide it"


def equal_values(attention):
    q, k, v = numbers(2, 6)
    assert torch.allclose(attention(q, k, torch.ones_like(v)), torch.ones_like(q)), "equal values hide every weight"


def corner_of_torch(attention):
    q, k, v = numbers(2, 6)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # torch's mask starts in the same wrong corner
    assert torch.allclose(attention(q, k, v), expected, atol=1e-6), "expects the fault itself"


test_find_the_bug = find_the_bug(
    "ch07_bug",
    right=right_attention,
    finder=finder,
    wrong={"whole text": whole_text, "equal values": equal_values, "torch's corner": corner_of_torch},
    hint="it hides while there are as many queries as keys",
)
