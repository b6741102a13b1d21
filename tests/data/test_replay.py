"""New rows among old ones: every new row once per epoch, the share of old ones as asked, exactly repeatable."""

from types import SimpleNamespace

import numpy as np
import pytest

from minillm.data import ReplayRows, StepBatches
from minillm.errors import UserError


def some_rows(n_rows, first, *, fixed_len=None):
    """Row i holds the number first + i, 1 to 5 times."""
    columns = [np.full(1 + i * 7 % 5, first + i) for i in range(n_rows)]

    class Rows:
        data_hash, summary, max_seq_len, store = f"hash {first} {n_rows}", {"rows": n_rows}, 8, SimpleNamespace()
        target_counts, target_bytes, log_prob = np.zeros(3), 11, -4.0

        def __init__(self):
            self.fixed_len = fixed_len
            self.lengths = np.array([len(column) for column in columns])

        def __len__(self):
            return n_rows

        def __getitem__(self, i):
            names = ("input_ids", "targets", "position_ids", "document_ids")
            return dict.fromkeys(names, columns[i])

    return Rows()


def epoch_of(batches, epoch):
    steps = [batches.step(epoch, index) for index in range(batches.steps_per_epoch)]
    return [n for step in steps for batch in step for n in batch["input_ids"][:, 0].tolist() if n]


@pytest.mark.parametrize("fixed_len", [None, 8])
@pytest.mark.parametrize(("share", "n_old"), [(0.25, 4), (0.5, 11), (0.01, 1), (0.8, 44)])
def test_an_epoch_has_every_new_row_once_and_the_share_of_old_ones(share, n_old, fixed_len):
    rows = ReplayRows(some_rows(11, 1, fixed_len=fixed_len), some_rows(60, 101, fixed_len=fixed_len), share=share)
    assert len(rows) == 11 + n_old
    batches = StepBatches(rows, batch_size=2, global_batch_size=4, seed=3)
    epochs = [epoch_of(batches, epoch) for epoch in (0, 1, 2)]
    for found in epochs:
        assert sorted(n for n in found if n < 100) == list(range(1, 12))
        old = [n for n in found if n > 100]
        assert len(old) == len(set(old)) == n_old
    assert len({tuple(sorted(found)) for found in epochs}) == 3  # other old rows each time
    again = StepBatches(rows, batch_size=1, global_batch_size=4, seed=3)
    again.step(2, 0)
    if fixed_len:
        assert [epoch_of(again, epoch) for epoch in (0, 1, 2)] == epochs


def test_ranks_share_an_epoch_between_them():
    rows = ReplayRows(some_rows(10, 1), some_rows(30, 101), share=0.3)
    whole = StepBatches(rows, batch_size=4, global_batch_size=4, seed=1)
    parts = [StepBatches(rows, batch_size=2, global_batch_size=4, rank=r, world_size=2, seed=1) for r in (0, 1)]
    assert sorted(epoch_of(whole, 5)) == sorted(epoch_of(parts[0], 5) + epoch_of(parts[1], 5))


def test_with_few_old_rows_some_come_twice():
    found = epoch_of(StepBatches(ReplayRows(some_rows(9, 1), some_rows(2, 101), share=0.4), batch_size=1,
                                 global_batch_size=1), 0)  # fmt: skip
    assert sorted(n for n in found if n < 100) == list(range(1, 10))
    assert len([n for n in found if n > 100]) == 6


def test_what_decides_the_order_is_in_the_hash():
    new, old = some_rows(9, 1), some_rows(20, 101)
    hashes = {ReplayRows(a, b, share=share).data_hash for a, b, share in
              [(new, old, 0.2), (new, old, 0.3), (old, new, 0.2), (new, some_rows(21, 101), 0.2)]}  # fmt: skip
    assert len(hashes) == 4
    assert ReplayRows(new, old, share=0.2).summary == {"rows": 9, "replayed_rows": 2, "replayed": {"rows": 20}}


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(UserError, match="must lie between 0 and 1"):
        ReplayRows(some_rows(3, 1), some_rows(3, 101), share=share)
