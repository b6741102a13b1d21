"""Exercises of chapter 8: turning pairs, the turns that training has seen, and positions of a packed row."""

import math

import pytest
import torch

from minillm.config import ModelConfig
from minillm.model.attention_plan import document_positions
from minillm.model.rope import apply_rope, rope_frequencies, rope_tables
from tests.exercises.kit import exercise, find_the_bug


def one_head(head_dim: int, theta: float) -> ModelConfig:
    return ModelConfig(hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, rope_theta=theta)


def library_rope(x, positions, theta):
    tables = rope_tables(positions[None], one_head(x.shape[1], theta), dtype=x.dtype)
    return apply_rope(x[None, :, None], *tables)[0, :, 0]


def by_hand(x, positions, theta, *, sign=1, power=2, neighbours=False):
    half = x.shape[1] // 2
    angles = positions[:, None] * theta ** (-power * torch.arange(half) / x.shape[1])
    cos, sin = angles.cos(), sign * angles.sin()
    first, second = (x[:, ::2], x[:, 1::2]) if neighbours else (x[:, :half], x[:, half:])
    parts = [first * cos - second * sin, second * cos + first * sin]
    return torch.stack(parts, dim=-1).flatten(1) if neighbours else torch.cat(parts, dim=-1)


@exercise(
    "ch08_rope",
    solution=library_rope,
    wrong={
        "clockwise": (lambda *x: by_hand(*x, sign=-1), "counter-clockwise"),
        "neighbours": (lambda *x: by_hand(*x, neighbours=True), "number i is paired"),
        "power without the 2": (lambda *x: by_hand(*x, power=1), "speed"),
        "turned by the index": (lambda x, positions, theta: library_rope(x, torch.arange(len(x)), theta), "positions"),
    },
)
def test_rotate_pairs(candidate):
    torch.manual_seed(0)
    unit = torch.tensor([[1.0, 0, 0, 0]])
    turned = candidate(unit, torch.tensor([1]), 100.0)
    assert turned[0, 0] != 1, "use the positions that are given: this row is not at position 0"
    assert turned[0, 1] == 0, "number i is paired with number i + K/2, not with its neighbour"
    assert turned[0, 2] > 0, "counter-clockwise: (1, 0) becomes (cos, sin)"
    slow = candidate(torch.tensor([[0.0, 1, 0, 0]]), torch.tensor([1]), 100.0)
    assert slow[0, 3] == pytest.approx(math.sin(0.1), abs=1e-6), "the speed of pair i is theta^(-2i/K)"
    x, positions = torch.randn(5, 6), torch.tensor([7, 0, 3, 3, 90])
    assert torch.allclose(candidate(x, positions, 1e4), by_hand(x, positions, 1e4), atol=1e-5), (
        "each row turns by its own position, in any order"
    )


def library_turns(head_dim, theta, length):
    config = one_head(head_dim, theta)
    frequencies, _ = rope_frequencies(torch.zeros(1, 1, dtype=torch.long), config, dtype=torch.float64)
    return (length * frequencies / (2 * math.pi)).tolist()


def one_per_number(head_dim, theta, length):
    return [length * theta ** (-i / head_dim) / (2 * math.pi) for i in range(head_dim)]


def inverse(head_dim, theta, length):
    return [1 / turns for turns in library_turns(head_dim, theta, length)]


@exercise(
    "ch08_context",
    solution=library_turns,
    wrong={
        "radians": (lambda *x: [turns * 2 * math.pi for turns in library_turns(*x)], "radians"),
        "one per number": (one_per_number, "two numbers"),
        "slow first": (lambda *x: library_turns(*x)[::-1], "fastest"),
        "lengths per turn": (inverse, "more turns"),
    },
)
def test_turns_seen(candidate):
    turns = candidate(8, 10_000.0, 2048)
    assert len(turns) == 4, "a pair is two numbers of the head: head_dim / 2 pairs"
    assert candidate(8, 10_000.0, 4096)[0] > turns[0], "a longer text makes more turns"
    assert turns[0] > turns[-1], "pair 0 is the fastest"
    assert turns[0] == pytest.approx(2048 / (2 * math.pi)), (
        "pair 0 turns by 1 radian per position, by 2048 in all; a full turn is 2 pi radians; do not round"
    )
    assert turns[-1] == pytest.approx(2.048 / (2 * math.pi)), "the speed of pair i is theta^(-2i/K)"


def finder(positions):
    ids = torch.tensor([[3, 3, 3, 1, 1, -1, -1]])
    assert positions(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1]], "numbers may fall, and padding begins a run too"


def one_document(positions):
    assert positions(torch.zeros(1, 5, dtype=torch.long)).tolist() == [[0, 1, 2, 3, 4]], "one document hides it"


def rising(positions):
    assert positions(torch.tensor([[0, 0, 1, 1, 1, 2]])).tolist() == [[0, 1, 0, 1, 2, 0]], "rising numbers hide it"


def not_restarted(positions):
    assert positions(torch.tensor([[0, 0, 1, 1]])).tolist() == [[0, 1, 2, 3]], "expects positions that go on"


test_find_the_bug = find_the_bug(
    "ch08_bug",
    right=document_positions,
    finder=finder,
    wrong={"one document": one_document, "rising numbers": rising, "positions go on": not_restarted},
    hint="it hides while the numbers of the documents rise",
)
