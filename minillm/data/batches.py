"""Rows into steps: which rows an update sees, in which order, cut for ranks and micro-batches.

The order is a pure function of (seed, epoch). A step's rows are ``global_batch_size`` consecutive ones of
that order; how they are dealt to ranks and micro-batches changes who computes them, never which they are:

    order of the epoch   | 7 2 9 4 | 0 5 8 1 | 3 6      steps of global_batch_size 4; the last is partial
    step 0, 2 ranks      rank 0: 7 9   rank 1: 2 4      dealt in turn, then cut by batch_size
    step 2, 2 ranks      rank 0: 3 .   rank 1: 6 .      . is a row of padding: every rank does equal work
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minillm.data.packing import IGNORE_INDEX
from minillm.errors import UserError

PADDING = {"input_ids": 0, "targets": IGNORE_INDEX, "position_ids": 0, "document_ids": -1}  # other columns: 0
# Computed here, on the CPU: on a GPU they need ``nonzero``, which makes the host wait in the middle of a step.
DERIVED = ("document_bounds", "target_positions")


def collate(
    rows: list[dict[str, np.ndarray]], pad_to: int | None = None, *, n_rows: int = 0, like: dict | None = None
) -> dict[str, Tensor]:
    """Return a batch of the rows' columns, (B, T) each, right-padded.

    Args:
        pad_to: T; None takes the longest row (at least 1). n_rows: B when larger than ``len(rows)``; the rest
            are rows of padding alone. like: a row with the columns to make when ``rows`` is empty.

    Numbers become float32 and int64. Further columns may have trailing dimensions: ``weights``, which are 1 in rows
    that have none, and columns that all rows have. Columns named ``other_...`` (KTO) form a second row with its own
    length. ``document_bounds`` and ``target_positions`` of the batch are added, also as ``other_...``.
    """
    batch = {}
    examples = rows or [like or dict.fromkeys(PADDING, np.zeros(0, np.int64))]
    templates = {name: np.asarray(column) for row in examples for name, column in row.items()}
    for name, template in templates.items():
        if name.removeprefix("other_") in DERIVED:
            continue
        columns = [row[name] if name in row else np.ones(len(row["input_ids"]), np.float32) for row in rows]
        length = pad_to or max([1, *map(len, columns)])
        dtype = np.float32 if template.dtype.kind == "f" else np.int64
        shape = (max(len(rows), n_rows), length, *template.shape[1:])
        padded = np.full(shape, PADDING.get(name.removeprefix("other_"), 0), dtype)
        for padded_row, values in zip(padded, columns, strict=False):
            padded_row[: len(values)] = values
        batch[name] = torch.from_numpy(padded)
    for prefix in ("", "other_"):
        if prefix + "document_ids" in batch:
            batch[prefix + "document_bounds"] = document_bounds(batch[prefix + "document_ids"])
        if prefix + "targets" in batch:
            batch[prefix + "target_positions"] = (batch[prefix + "targets"] != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return batch


def example_row(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the first row of a batch's columns, for ``collate(like=)``."""
    return {name: column[0].numpy() for name, column in batch.items() if name.removeprefix("other_") not in DERIVED}


def document_bounds(document_ids: Tensor) -> Tensor:
    """Return (n + 1,) int32: where each document of document_ids (B, T) begins when the rows lie end to end, and B·T.

    A document is a run of equal numbers within a row, so a stretch of padding is one too.
    """
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = is_start.flatten().nonzero()[:, 0]
    return torch.cat([starts, torch.tensor([document_ids.numel()])]).to(torch.int32)


class StepBatches:
    """The steps of each epoch over ``rows``; see the module's picture.

    Args:
        rows: ``TextRows``, ``ChatRows``, or any sequence of column dicts with ``fixed_len`` (None or T) and,
            optionally, ``lengths`` (n_rows,) and ``draw(rng)``, which chooses and orders an epoch's rows by itself.
        batch_size: rows per micro-batch. global_batch_size: rows per step over all ranks.
        rank, world_size: which share of each step is this process's.
        seed: of the order. shuffle: False keeps the rows' own order (validation).

    Raises UserError when global_batch_size is not a multiple of batch_size x world_size.
    """

    def __init__(
        self,
        rows,
        *,
        batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        if batch_size < 1 or global_batch_size < 1:
            raise UserError(f"batch_size {batch_size}, global_batch_size {global_batch_size}: must be at least 1")
        if global_batch_size % (batch_size * world_size):
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of batch_size {batch_size} x "
                f"{world_size} ranks = {batch_size * world_size}: change one of them"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not within world_size {world_size}")
        self.rows = rows
        self.batch_size, self.global_batch_size = batch_size, global_batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.n_micro_batches = global_batch_size // (batch_size * world_size)  # of every step, on every rank
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last one may hold fewer rows."""
        return -(-len(self.rows) // self.global_batch_size)

    def step_rows(self, epoch: int, index: int) -> np.ndarray:
        """Return the row numbers of step ``index``, of all ranks together.

        Rows of different lengths are put in order of length, so that those of one micro-batch need little
        padding; rows that are all padded to one length stay in the epoch's order.
        """
        if not 0 <= index < self.steps_per_epoch:
            raise IndexError(f"step {index} of {self.steps_per_epoch}")
        begin = index * self.global_batch_size
        numbers = self._epoch_order(epoch)[begin : begin + self.global_batch_size]
        lengths = getattr(self.rows, "lengths", None)
        if self.rows.fixed_len is None and lengths is not None:
            numbers = numbers[np.argsort(-lengths[numbers], kind="stable")]
        return numbers

    def step(self, epoch: int, index: int) -> list[dict[str, Tensor]]:
        """Return this rank's ``n_micro_batches`` of step ``index``, each of ``batch_size`` rows."""
        mine = self.step_rows(epoch, index)[self.rank :: self.world_size]
        micro_batches = []
        for begin in range(0, self.n_micro_batches * self.batch_size, self.batch_size):
            rows = [self.rows[int(number)] for number in mine[begin : begin + self.batch_size]]
            like = None if rows else self.rows[0]
            micro_batches.append(collate(rows, self.rows.fixed_len, n_rows=self.batch_size, like=like))
        return micro_batches

    def iterate(
        self, epoch: int, start: int = 0, *, num_workers: int = 0
    ) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """Yield ``(index, step(epoch, index))`` from step ``start`` to the end of the epoch.

        num_workers: processes that prepare steps ahead; they change nothing but the time.
        """
        indices = range(start, self.steps_per_epoch)
        if not num_workers:
            for index in indices:
                yield index, self.step(epoch, index)
            return
        loader = DataLoader(
            _EpochSteps(self, epoch),
            batch_size=None,
            sampler=indices,
            num_workers=num_workers,
            # A loader draws a seed for its workers; from the global generator that draw would move the run's
            # randomness, and a resumed run would differ from an uninterrupted one.
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_leave_signals_to_the_run,
        )
        yield from loader

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            rng, n_rows = np.random.default_rng([self.seed, epoch]), len(self.rows)
            if hasattr(self.rows, "draw"):
                order = self.rows.draw(rng)
            else:
                order = rng.permutation(n_rows) if self.shuffle else np.arange(n_rows)
            self._order = (epoch, order)
        return self._order[1]


def _leave_signals_to_the_run(worker: int) -> None:
    """Go on when the whole process group is told to stop: the run finishes its step first, and ends its workers."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _EpochSteps(Dataset):
    def __init__(self, batches: StepBatches, epoch: int):
        self.batches, self.epoch = batches, epoch

    def __getitem__(self, index: int) -> tuple[int, list[dict[str, Tensor]]]:
        return index, self.batches.step(self.epoch, index)

    def __len__(self) -> int:
        return self.batches.steps_per_epoch
