"""Exercises of chapter 30: an alarm, a step that fits into memory, and a check that misses some NaN."""

import math

from minillm.cli.arguments import PretrainArguments
from minillm.reports.divergence import LossAlarm
from tests.exercises.kit import exercise, find_the_bug


def library_alarm(losses, vocab_size):
    alarm = LossAlarm(vocab_size=vocab_size, from_scratch=True)
    for step, loss in enumerate(losses, 1):
        if (message := alarm.train(step, loss)) and "that of guessing" in message:
            return step
    return None


def mean_alarm(losses, vocab_size, *, decay=0.95, limit=0.5, divides=True):
    total = weight = 0.0
    for step, loss in enumerate(losses, 1):
        total, weight = decay * total + loss, decay * weight + 1
        mean = total / weight if divides else (1 - decay) * total
        if mean > math.log(vocab_size) + limit:
            return step
    return None


@exercise(
    "ch30_alarm",
    solution=library_alarm,
    wrong={
        "each loss alone": (lambda losses, v: mean_alarm(losses, v, decay=0.0), "one bad step"),
        "mean of all steps": (lambda losses, v: mean_alarm(losses, v, decay=1.0), "too late: the past fades"),
        "starts at zero": (lambda losses, v: mean_alarm(losses, v, divides=False), "sum of the weights"),
        "without half a nat": (lambda losses, v: mean_alarm(losses, v, limit=0.0), "half a nat"),
        "against the vocabulary": (lambda losses, v: mean_alarm(losses, math.exp(math.log2(v))), "ln V"),
    },
)
def test_first_alarm(candidate):
    guessing = math.log(320)
    assert candidate([guessing] + [3.0] * 30, 320) is None, "a run that learns is no alarm"
    assert candidate([guessing + 0.4] * 30, 320) is None, "up to half a nat above ln V is no alarm"
    assert candidate([guessing] + [3.0] * 20 + [30.0] + [3.0] * 20, 320) is None, (
        "one bad step among good ones is no alarm: the mean decides"
    )
    assert candidate([guessing + 0.4] * 5 + [guessing + 8] * 3, 320) == 6, (
        "divide by the sum of the weights, which after five steps is not yet 20; and a guesser's loss is ln V"
    )
    rises = [guessing] + [3.0] * 60 + [9.0] * 60
    assert candidate(rises, 320) == mean_alarm(rises, 320), "too late: the past fades, a step back counts 0.95 times"


def library_split(n_rows, n_ranks, max_rows):
    per_rank = n_rows // n_ranks
    batch_size = max(size for size in range(1, min(per_rank, max_rows) + 1) if per_rank % size == 0)
    return batch_size, per_rank // batch_size


def rounds_up(n_rows, n_ranks, max_rows):
    per_rank = n_rows // n_ranks
    batch_size = min(per_rank, max_rows)
    return batch_size, -(-per_rank // batch_size)


@exercise(
    "ch30_split",
    solution=library_split,
    wrong={
        "forgets the ranks": (lambda n, ranks, limit: library_split(n, 1, limit), "another run"),
        "rounds up": (rounds_up, "another run"),
        "one row at a time": (lambda n, ranks, limit: (1, n // ranks), "largest"),
        "everything at once": (lambda n, ranks, limit: (n // ranks, 1), "fit into the memory"),
    },
)
def test_split_step(candidate):
    for n_rows, n_ranks, max_rows in ((32, 1, 8), (32, 4, 8), (24, 2, 5), (8, 8, 64)):
        case = f"{n_rows} rows, {n_ranks} ranks, {max_rows} in memory"
        batch_size, accumulation_steps = candidate(n_rows, n_ranks, max_rows)
        flags = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        n_made = PretrainArguments(data_path="texts.jsonl", **flags).rows_per_step(n_ranks)
        assert batch_size <= max_rows, f"{case}: {batch_size} rows do not fit into the memory"
        assert n_made == n_rows, f"{case}: a step would have {n_made} rows, and that is another run"
        best = library_split(n_rows, n_ranks, max_rows)[0]
        assert batch_size == best, f"{case}: {batch_size} is not the largest batch size that works"


def all_finite(losses):
    return all(map(math.isfinite, losses))


def finder(may_update):
    assert may_update([1.0, 2.0])
    assert not may_update([1.0, math.nan]), "a comparison with NaN is never true, so min and max may pass it over"


def first_is_nan(may_update):
    assert not may_update([math.nan, 1.0])


def infinite(may_update):
    assert not may_update([1.0, math.inf])
    assert not may_update([-math.inf, 1.0])


def finite(may_update):
    assert may_update([1.0, 2.0, 3.0])


def too_strict(may_update):
    assert not may_update([1.0, 1e30]), "expects that large losses are refused"


test_find_the_bug = find_the_bug(
    "ch30_bug",
    right=all_finite,
    finder=finder,
    wrong={"NaN in front": first_is_nan, "infinity": infinite, "finite ones": finite, "large ones": too_strict},
    hint="it hides with infinity, and with NaN at the first place",
)
