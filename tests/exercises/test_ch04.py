"""Exercises of chapter 4: the shift, the mask, and a row of documents."""

from itertools import pairwise

import torch

from minillm.model.attention_plan import document_mask
from tests.exercises.kit import exercise, find_the_bug


def right_shift(stored, is_answer):
    targets = [token if counts else -100 for token, counts in zip(stored[1:], is_answer[1:], strict=True)]
    return stored[:-1], targets


def not_shifted(stored, is_answer):
    return stored[:-1], [token if counts else -100 for token, counts in zip(stored, is_answer, strict=True)][:-1]


def mask_of_inputs(stored, is_answer):
    return stored[:-1], [token if counts else -100 for token, counts in zip(stored[1:], is_answer[:-1], strict=True)]


def without_mask(stored, is_answer):
    return stored[:-1], stored[1:]


def inputs_masked_too(stored, is_answer):
    inputs, targets = right_shift(stored, is_answer)
    return [token if target != -100 else 0 for token, target in zip(inputs, targets, strict=True)], targets


@exercise(
    "ch04_shift",
    solution=right_shift,
    wrong={
        "no shift": (not_shifted, "the token after"),
        "mask of the inputs": (mask_of_inputs, "the mask belongs to the targets"),
        "without the mask": (without_mask, "questions"),
        "hides the question": (inputs_masked_too, "still reads"),
    },
)
def test_shift(candidate):
    inputs, targets = candidate([5, 6, 7, 8], [1, 1, 1, 1])
    assert list(targets) == [6, 7, 8], "targets[t] is the token after input_ids[t]"
    assert list(inputs) == [5, 6, 7], "the last token has no target: it is no input"
    inputs, targets = candidate([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])
    assert list(targets) != [2, 3, 4, 5], "questions are no targets: put -100 there"
    assert list(targets) == [-100, -100, 4, 5], "the mask belongs to the targets: shift it with them"
    assert list(inputs) == [1, 2, 3, 4], "the model still reads the question: input_ids keep it"


def outer(documents):
    return documents[:, None] == documents[None, :]


@exercise(
    "ch04_mask",
    solution=lambda documents: document_mask(documents[None])[0, 0],
    wrong={
        "sees the future": (lambda documents: outer(documents) & (documents >= 0)[:, None], "the future"),
        "causal only": (lambda documents: torch.ones(len(documents), len(documents)).bool().tril(), "its own document"),
        "padding sees nothing": (
            lambda documents: (outer(documents) & (documents >= 0)[:, None]).tril(),
            "padding looks at itself",
        ),
        "not at itself": (
            lambda documents: document_mask(documents[None])[0, 0] & ~torch.eye(len(documents)).bool(),
            "looks at itself",
        ),
        "turned": (lambda documents: document_mask(documents[None])[0, 0].T, "the future"),
        "padding is a document": (lambda documents: outer(documents).tril(), "itself alone"),
    },
)
def test_mask(candidate):
    found = candidate(torch.tensor([0, 0, 1, 1, 1, -1, -1]))
    assert found.shape == (7, 7), "a row and a column for each token: (T, T)"
    assert not found.triu(1).any(), "a token must not look at the future: columns right of the diagonal are false"
    assert not found[2:5, :2].any(), "a token looks only into its own document"
    assert found[:5, :5].diagonal().all(), "a token looks at itself too"
    assert found[5:, 5:].diagonal().all(), "padding looks at itself: a softmax over nothing is 0 / 0"
    assert not found[6, 5], "padding looks at itself alone"
    assert int(found.sum()) == 3 + 6 + 2, "n (n + 1) / 2 pairs in a document of n tokens, one for each padding"


def right_pairs(documents):
    return [pair for document in documents for pair in pairwise(document)]


def finder(pairs):
    assert (3, 7) not in pairs([[1, 2, 3], [7, 8]]), "3 ends a document; 7, which begins another, is not its target"


def one_document(pairs):
    assert pairs([[1, 2, 3]]) == [(1, 2), (2, 3)]


def expects_one_pair_less(pairs):
    assert len(pairs([[1, 2, 3], [7, 8]])) == 4


def targets_follow_inputs(pairs):
    assert {(1, 2), (2, 3), (7, 8)} <= set(pairs([[1, 2, 3], [7, 8]]))


test_find_the_bug = find_the_bug(
    "ch04_bug",
    right=right_pairs,
    finder=finder,
    wrong={"one document": one_document, "counts": expects_one_pair_less, "a part": targets_follow_inputs},
    hint="it hides in a row of one document; what must not be among the pairs?",
)
