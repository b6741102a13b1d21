"""Exercises of chapter 27: slots, what follows a rejection, and pages that are found by too little."""

import torch

from minillm.serving.pages import PagePool
from minillm.serving.speculate import _draw_or_keep
from tests.exercises.kit import exercise, find_the_bug


def library_slots(pages, start, end, page_len):
    return [pages[t // page_len] * page_len + t % page_len for t in range(start, end)]


def as_if_in_a_row(pages, start, end, page_len):
    return [pages[0] * page_len + t for t in range(start, end)]


def from_zero(pages, start, end, page_len):
    return library_slots(pages, 0, end - start, page_len)


def without_page_len(pages, start, end, page_len):
    return [pages[t // page_len] + t % page_len for t in range(start, end)]


def one_too_many(pages, start, end, page_len):
    return library_slots(pages, start, end + 1, page_len)


@exercise(
    "ch27_slots",
    solution=library_slots,
    wrong={
        "pages in a row": (as_if_in_a_row, "anywhere in memory"),
        "positions from 0": (from_zero, "position start"),
        "page numbers taken for slots": (without_page_len, "begins at"),
        "end included": (one_too_many, "end - 1"),
    },
)
def test_slots(candidate):
    first = list(candidate([7], 0, 1, 4))
    assert first[0] == 28, "page 7 begins at slot 7 · 4 = 28"
    assert first == [28], "the last position is end - 1"
    assert list(candidate([7, 2, 9], 2, 6, 4))[:1] == [30], "the first slot is that of position start, not of 0"
    assert list(candidate([7, 2, 9], 2, 6, 4)) == [30, 31, 8, 9], (
        "pages lie anywhere in memory: position 4 is in page 2, not behind page 7"
    )


def library_after_rejection(p, q):
    return (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()


@exercise(
    "ch27_residual",
    solution=library_after_rejection,
    wrong={
        "from p": (lambda p, q: p, "too often"),
        "absolute difference": (lambda p, q: (p - q).abs() / (p - q).abs().sum(), "already"),
        "not normalised": (lambda p, q: (p - q).clamp(min=0), "add up to 1"),
        "softmax": (lambda p, q: (p - q).softmax(0), "already"),
    },
)
def test_after_rejection(candidate):
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.4])
    rest = torch.as_tensor(candidate(p, q))
    assert abs(float(rest.sum()) - 1) < 1e-6, "a distribution must add up to 1"
    result = torch.minimum(p, q) + (1 - torch.minimum(p, q).sum()) * rest
    assert not rest.allclose(p), "from p itself, a token that guesses give already would come too often"
    assert float(rest[2]) == 0, "a token with q > p comes often enough already: it must not be drawn here"
    assert result.allclose(p), f"kept guesses and this together must follow p; they follow {result.tolist()}"


def test_the_engine_draws_the_same():
    """The formula of the exercise is what ``check_draft`` does: a grid of uniform numbers gives its shares."""

    class Row:
        limit, ids = 1, ()

    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.4, 0.4])
    drawn = []
    for number in range(100):
        Row.uniforms = [(number + 0.5) / 100, 0.999]  # to draw; to keep: never
        drawn.append(_draw_or_keep(Row, p.log(), 2, q.double()))
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 100
    assert shares.allclose(library_after_rejection(p, q), atol=0.011)


def library_n_shared(stored, prompt, page_len):
    pool = PagePool(64, page_len)
    before = None
    for start in range(0, len(stored) - page_len + 1, page_len):
        page = pool.take()
        pool.add(page, stored[start : start + page_len], before, ())
        before = page
    return len(pool.find(prompt, ()))


def finder(n_shared):
    assert n_shared([1, 2, 3, 4, 5], [3, 4, 9], 2) == 0, "the same tokens behind others are another page"


def same_beginning(n_shared):
    assert n_shared([1, 2, 3, 4], [1, 2, 3, 4, 5], 2) == 2


def nothing_in_common(n_shared):
    assert n_shared([1, 2, 3, 4], [5, 6, 7, 8, 9], 2) == 0


def whole_prompt(n_shared):
    assert n_shared([1, 2, 3, 4], [1, 2, 3, 4], 2) == 1, "one token is left to compute"


def expects_the_fault(n_shared):
    assert n_shared([1, 2, 3, 4, 5], [3, 4, 9], 2) == 1


test_find_the_bug = find_the_bug(
    "ch27_bug",
    right=library_n_shared,
    finder=finder,
    wrong={
        "the same beginning": same_beginning,
        "nothing in common": nothing_in_common,
        "the whole prompt": whole_prompt,
        "expects the fault": expects_the_fault,
    },
    hint="it hides while the prompt begins as stored does; where may the same tokens stand?",
)
