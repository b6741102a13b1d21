import numpy as np
import pytest
import torch

from minillm.data.batches import DERIVED, StepBatches, collate
from minillm.data.text import TextRows
from minillm.errors import UserError


class FakeRows:
    """Row i holds the number i + 1, so that a batch tells which rows it is made of."""

    def __init__(self, n_rows, *, fixed_len=None, longest=6):
        self.fixed_len = fixed_len
        self.lengths = np.random.default_rng(n_rows).integers(1, longest + 1, n_rows)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        n = self.lengths[i]
        column = np.full(n, i + 1)
        return {"input_ids": column, "targets": column, "position_ids": np.arange(n), "document_ids": np.zeros(n, int)}


def members(micro_batches):
    return [[n - 1 for n in batch["input_ids"][:, 0].tolist()] for batch in micro_batches]  # -1: padding


@pytest.mark.parametrize("fixed_len", [None, 8])
@pytest.mark.parametrize("n_rows", [1, 7, 24, 53])
def test_a_step_has_the_same_rows_however_it_is_cut(n_rows, fixed_len):
    rows = FakeRows(n_rows, fixed_len=fixed_len)
    cuts = [(ranks, size) for ranks in (1, 2, 4) for size in (1, 2, 3, 6, 12) if 12 % (ranks * size) == 0]
    assert len(cuts) > 8
    for epoch in (0, 1):
        everything = []
        for index in range(-(-n_rows // 12)):
            unions = []
            for ranks, size in cuts:
                parts = [
                    StepBatches(rows, batch_size=size, global_batch_size=12, rank=r, world_size=ranks, seed=5)
                    for r in range(ranks)
                ]
                batches = [part.step(epoch, index) for part in parts]
                assert {len(b) for b in batches} == {12 // (ranks * size)}
                assert all(b["input_ids"].shape[0] == size for rank in batches for b in rank)
                unions.append(sorted(i for rank in batches for batch in members(rank) for i in batch if i >= 0))
            assert all(union == unions[0] for union in unions)
            everything += unions[0]
        assert sorted(everything) == list(range(n_rows))  # each row once per epoch, the last partial step kept


def test_the_order_is_a_pure_function_of_seed_and_epoch():
    def order(seed, epoch, **more):
        steps = StepBatches(FakeRows(40, fixed_len=8), batch_size=2, global_batch_size=8, seed=seed, **more)
        steps.step(3, 0)  # what was asked before does not matter
        torch.manual_seed(epoch * 17)
        np.random.seed(seed + 1)  # noqa: NPY002 - the global state is what must not matter
        return [n for i in range(steps.steps_per_epoch) for batch in members(steps.step(epoch, i)) for n in batch]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert order(1, 0, shuffle=False) == order(2, 1, shuffle=False) == list(range(40))


def test_ranks_do_equal_work():
    """Neither rank gets the long rows, and every rank has a row to work on while there are any."""
    rows = FakeRows(200, longest=100)
    parts = [StepBatches(rows, batch_size=5, global_batch_size=80, rank=r, world_size=2) for r in (0, 1)]
    tokens = [sum(int((b["document_ids"] >= 0).sum()) for b in part.step(0, 0)) for part in parts]
    assert abs(tokens[0] - tokens[1]) <= 100  # at most one row's difference
    padded = sum(b["input_ids"].numel() for part in parts for b in part.step(0, 0))
    assert padded < 1.25 * sum(tokens)  # nearly twice as much, were they not in order of length


def test_short_ranks_get_rows_of_padding():
    parts = [
        StepBatches(FakeRows(3, fixed_len=8), batch_size=2, global_batch_size=8, rank=r, world_size=2) for r in (0, 1)
    ]
    first, second = (part.step(0, 0) for part in parts)
    assert [len(first), len(second)] == [2, 2]
    assert sum(n >= 0 for batch in members(first) for n in batch) == 2
    assert sum(n >= 0 for batch in members(second) for n in batch) == 1
    empty = second[1]
    assert set(empty) == {"input_ids", "targets", "position_ids", "document_ids", *DERIVED}
    assert empty["input_ids"].shape == (2, 8)
    assert (empty["input_ids"] == 0).all()
    assert (empty["targets"] == -100).all()
    assert (empty["document_ids"] == -1).all()
    ragged = StepBatches(FakeRows(1), batch_size=1, global_batch_size=2).step(0, 0)
    assert ragged[1]["input_ids"].shape == (1, 1)


def test_iterate_starts_anywhere_with_any_number_of_workers(write, texts, tokenizer, tmp_path):
    path = write("a.jsonl", [{"text": t} for t in texts])
    rows = TextRows(path, tokenizer, max_seq_len=32, cache_dir=tmp_path)
    steps = StepBatches(rows, batch_size=2, global_batch_size=4, seed=3)
    state = torch.get_rng_state()
    expected = [(i, steps.step(1, i)) for i in range(2, steps.steps_per_epoch)]
    assert len(expected) > 5
    for num_workers in (0, 2):
        found = list(steps.iterate(1, 2, num_workers=num_workers))
        assert [i for i, _ in found] == [i for i, _ in expected]
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert all(torch.equal(a[name], b[name]) for name in b)
    assert torch.equal(torch.get_rng_state(), state)  # prefetching draws nothing from the run's randomness
    assert list(steps.iterate(0, steps.steps_per_epoch)) == []


def test_collate():
    rows = [
        {"input_ids": np.array([5, 6]), "targets": np.array([6, -100]), "position_ids": np.array([0, 1]),
         "document_ids": np.array([0, 0])},
        {"input_ids": np.array([7]), "targets": np.array([8]), "position_ids": np.array([0]),
         "document_ids": np.array([0]), "weights": np.array([0.5])},
    ]  # fmt: skip
    batch = collate(rows, 3)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 0], [7, 0, 0]],
        "targets": [[6, -100, -100], [8, -100, -100]],
        "position_ids": [[0, 1, 0], [0, 0, 0]],
        "document_ids": [[0, 0, -1], [0, -1, -1]],
        "weights": [[1.0, 1.0, 0.0], [0.5, 0.0, 0.0]],
        "document_bounds": [0, 2, 3, 4, 6],  # padding counts as a document
        "target_positions": [0, 3],
    }
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64", "torch.float32", "torch.int32"}
    assert collate(rows[:1])["input_ids"].tolist() == [[5, 6]]
    assert "weights" not in collate(rows[:1], 4, n_rows=2)


def test_errors():
    rows = FakeRows(4)
    for settings, reason in [
        ({"batch_size": 0, "global_batch_size": 4}, "at least 1"),
        ({"batch_size": 3, "global_batch_size": 4}, "not a multiple of batch_size 3 x 1 ranks"),
        ({"batch_size": 2, "global_batch_size": 2, "world_size": 2}, "not a multiple of batch_size 2 x 2 ranks"),
        ({"batch_size": 1, "global_batch_size": 2, "world_size": 2, "rank": 2}, "rank 2"),
    ]:
        with pytest.raises(UserError, match=reason):
            StepBatches(rows, **settings)
    with pytest.raises(IndexError):
        StepBatches(rows, batch_size=1, global_batch_size=4).step(0, 1)
