"""Exercises of chapter 17: targets of a conversation, the share of replayed rows, and a mask."""

import numpy as np
import torch

from minillm.data import ReplayRows
from tests.exercises.kit import exercise, find_the_bug


def flat(turns):
    ids = [token for _, turn in turns for token in turn]
    return ids, [int(is_answer) for is_answer, turn in turns for _ in turn]


def by_hand(turns):
    ids, mask = flat(turns)
    return ids[:-1], [token if is_target else -100 for token, is_target in zip(ids[1:], mask[1:], strict=True)]


def not_shifted(turns):
    ids, mask = flat(turns)
    return ids, [token if is_target else -100 for token, is_target in zip(ids, mask, strict=True)]


def everything(turns):
    ids, _ = flat(turns)
    return ids[:-1], ids[1:]


def the_last_alone(turns):
    return by_hand([(is_answer and i == len(turns) - 1, ids) for i, (is_answer, ids) in enumerate(turns)])


def without_end_mark(turns):
    return by_hand([part for is_answer, ids in turns for part in ((is_answer, ids[:-1]), (False, ids[-1:]))])


def questions(turns):
    return by_hand([(not is_answer, ids) for is_answer, ids in turns])


@exercise(
    "ch17_targets",
    solution=by_hand,
    wrong={
        "not shifted": (not_shifted, "one less"),
        "questions too": (everything, "questions are context"),
        "the last answer alone": (the_last_alone, "every answer"),
        "no end mark": (without_end_mark, "to stop"),
        "exchanged": (questions, "questions are context"),
    },
)
def test_targets_of(candidate):
    turns = [(False, [1, 2, 3]), (True, [4, 5, 9]), (False, [6]), (True, [7, 9])]
    input_ids, targets = (list(column) for column in candidate(turns))
    assert len(input_ids) == len(targets) == 8, "nine tokens give eight pairs: one less than there are tokens"
    assert input_ids == [1, 2, 3, 4, 5, 9, 6, 7], "the inputs are all tokens but the last, questions too"
    assert targets[:2] == [-100, -100], "questions are context, not targets"
    assert targets[2:4] == [4, 5], "every answer is a target, not only the last; its first token is predicted at 3"
    assert targets[4] == targets[7] == 9, "the end mark is a target, or the model never learns to stop"
    assert targets[5:7] == [-100, 7], "after an answer comes context again: 6 is no target, 7 is predicted at 6"


class Rows(list):
    """As much of rows as ReplayRows reads."""

    fixed_len = max_seq_len = 8
    store, summary, data_hash = None, {}, ""
    target_counts, target_bytes = np.zeros(1), 0


def by_library(n_new, share):
    return ReplayRows(Rows(range(n_new)), Rows([0]), share=share).n_old


@exercise(
    "ch17_replay",
    solution=by_library,
    wrong={
        "of the new rows": (lambda n, share: max(1, round(n * share)), "of all rows"),
        "the other way round": (lambda n, share: max(1, round(n * (1 - share) / share)), "more than half"),
        "none": (lambda n, share: round(n * share / (1 - share)), "at least 1"),
        "cut off": (lambda n, share: max(1, int(n * share / (1 - share))), "nearest"),
    },
)
def test_n_replayed(candidate):
    assert candidate(100, 0.5) in (50, 100), "with one half there are as many old rows as new ones"
    assert candidate(100, 0.8) > 100, "a share above one half means more than half of all rows: more old than new"
    assert candidate(6, 0.25) == 2, "2 of 8 is a quarter: the share is one of all rows, not of the new ones"
    assert candidate(10, 0.01) == 1, "replay at least 1 row"
    assert candidate(11, 0.2) == 3, "2.75 rows: round to the nearest number"


def right(ids, mask):
    return torch.where(mask[1:] == 1, ids[1:], -100)


def finder(targets):
    ids, mask = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 1, 1, 0])
    assert targets(ids, mask).tolist() == [-100, 3, 4, -100], "a target is masked by its own mask"


def all_answers(targets):
    ids = torch.tensor([1, 2, 3])
    assert targets(ids, torch.tensor([1, 1, 1])).tolist() == [2, 3], "no question hides it"


def only_the_count(targets):
    ids, mask = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 0, 1, 1, 0])
    assert (targets(ids, mask) != -100).sum() == 2, "the number of targets is right"


def no_answers(targets):
    assert (targets(torch.arange(4), torch.zeros(4)) == -100).all(), "no answer hides it"


def same_tokens(targets):
    ids, mask = torch.tensor([7, 7, 7, 7]), torch.tensor([0, 1, 1, 0])
    found = targets(ids, mask)
    assert found[found != -100].tolist() == [7, 7], "equal tokens hide it"


test_find_the_bug = find_the_bug(
    "ch17_bug",
    right=right,
    finder=finder,
    hint="it hides in the number of targets, and while all tokens have the same mask",
    wrong={
        "all answers": all_answers,
        "only the count": only_the_count,
        "no answers": no_answers,
        "equal tokens": same_tokens,
    },
)
