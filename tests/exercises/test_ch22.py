"""Exercises of chapter 22: the draw, the nucleus, and a penalty that rewards."""

import torch

from minillm.inference.sampling import draw, keep_top_p, penalize_repetition
from tests.exercises.kit import exercise, find_the_bug


def library_draw(probabilities, uniform):
    return int(draw(probabilities.log()[None], torch.tensor([uniform], dtype=torch.float64)))


def cumulative_up_to(probabilities, uniform):
    return int((probabilities.cumsum(0) < uniform).sum())


def nearest_probability(probabilities, uniform):
    return int((probabilities - uniform).abs().argmin())


def greedy(probabilities, uniform):
    return int(probabilities.argmax())


def one_too_far(probabilities, uniform):
    return min(library_draw(probabilities, uniform) + 1, len(probabilities) - 1)


@exercise(
    "ch22_draw",
    solution=library_draw,
    wrong={
        "the limit belongs to the token before": (cumulative_up_to, "probability 0"),
        "nearest probability": (nearest_probability, "share"),
        "ignores the number": (greedy, "share"),
        "off by one": (one_too_far, "share"),
    },
)
def test_draw_token(candidate):
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    drawn = [int(candidate(p, (i + 0.5) / 100)) for i in range(100)]
    shares = [drawn.count(token) for token in range(3)]
    assert shares == [50, 25, 25], f"of 100 even numbers each token must get its share, 50, 25, 25; yours: {shares}"
    first_is_zero = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert int(candidate(first_is_zero, 0.0)) == 1, "a token with probability 0 must never be drawn, also at u = 0"
    assert int(candidate(p, 0.5)) == 1, "F[0] = 0.5 belongs to the next token: F[i - 1] <= u < F[i]"


def library_nucleus(probabilities, p):
    return set(keep_top_p(probabilities.log()[None], p)[0].isfinite().nonzero()[:, 0].tolist())


def without_the_crossing_one(probabilities, p):
    values, order = probabilities.sort(descending=True)
    return set(order[values.cumsum(0) <= p].tolist())


def without_sorting(probabilities, p):
    return set(range(int((probabilities.cumsum(0) < p).sum()) + 1))


def from_the_smallest(probabilities, p):
    values, order = probabilities.sort()
    return set(order[: int((values.cumsum(0) < p).sum()) + 1].tolist())


def one_more(probabilities, p):
    values, order = probabilities.sort(descending=True)
    return set(order[: int((values.cumsum(0) < p).sum()) + 2].tolist())


@exercise(
    "ch22_nucleus",
    solution=library_nucleus,
    wrong={
        "the crossing token left out": (without_the_crossing_one, "crosses"),
        "not sorted": (without_sorting, "most probable"),
        "the least probable ones": (from_the_smallest, "most probable"),
        "one too many": (one_more, "fewest"),
    },
)
def test_nucleus(candidate):
    p = torch.tensor([0.07, 0.5, 0.03, 0.25, 0.15])
    kept = set(candidate(p, 0.7))
    assert kept, "the token that crosses the limit belongs to the set"
    assert 1 in kept, "begin with the most probable token, not with the smallest"
    assert 2 not in kept, "begin with the most probable token, not with the first or the smallest"
    assert len(kept) > 1, "0.5 does not reach 0.7: the token that crosses the limit belongs to the set"
    assert kept == {1, 3}, "0.5 + 0.25 reaches 0.7: the fewest tokens, so no third one"
    assert set(candidate(p, 0.2)) == {1}, "one token is always kept: the one that crosses the limit"
    assert set(candidate(p, 0.95)) == {0, 1, 3, 4}, "0.5 + 0.25 + 0.15 are 0.9: 0.95 needs the next one, 0.07, as well"


def finder(penalize):
    logits = torch.tensor([[-2.0, 1.0]])
    assert float(penalize(logits, torch.tensor([[True, False]]), 2.0)[0, 0]) < -2.0, "a negative logit must fall"


def only_positive(penalize):
    logits = torch.tensor([[3.0, 1.0]])
    assert float(penalize(logits, torch.tensor([[True, False]]), 1.5)[0, 0]) == 2.0


def penalty_one(penalize):
    logits = torch.tensor([[-3.0, 1.0]])
    assert penalize(logits, torch.ones(1, 2, dtype=torch.bool), 1.0).equal(logits)


def expects_division(penalize):
    assert float(penalize(torch.tensor([[-2.0]]), torch.tensor([[True]]), 2.0)) == -1.0


def unseen_only(penalize):
    logits = torch.tensor([[-2.0, 5.0]])
    assert penalize(logits, torch.zeros(1, 2, dtype=torch.bool), 2.0).equal(logits)


test_find_the_bug = find_the_bug(
    "ch22_bug",
    right=penalize_repetition,
    finder=finder,
    wrong={
        "positive logits only": only_positive,
        "penalty 1 changes nothing": penalty_one,
        "expects the fault": expects_division,
        "tokens that were not seen": unseen_only,
    },
    hint="it hides while the logits of the seen tokens are positive",
)
