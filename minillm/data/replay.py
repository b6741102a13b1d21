"""Mixes old rows into new ones, so that a model does not forget the old data while it learns the new.

Rehearsal: Robins, Catastrophic forgetting, rehearsal and pseudorehearsal (1995). Every epoch has all new rows, and a
new random choice of old rows; ``share`` says how many:

    share 0.25    | n n o n n n n o |    6 new rows, 2 of the many old ones
"""

import hashlib

import numpy as np

from minillm.data.packing import PackedRows
from minillm.errors import UserError


class ReplayRows:
    """The rows of ``new``, and in every epoch some rows of ``old`` among them, for ``StepBatches``.

    ``len(rows)`` is the number of rows of an epoch; row numbers from ``len(new)`` are old rows. Both must have the same
    row length and packing. ``summary`` and ``target_counts`` are those of the new rows.

    Args:
        share: of old rows in an epoch, above 0 and below 1.

    Raises:
        UserError: a share out of range.
    """

    def __init__(self, new: PackedRows, old: PackedRows, *, share: float):
        if not 0 < share < 1:
            raise UserError(f"replay share {share}: must lie between 0 and 1, e.g. 0.25 for a quarter of all rows")
        self.new, self.old = new, old
        self.n_old = max(1, round(len(new) * share / (1 - share)))
        self.fixed_len, self.max_seq_len = new.fixed_len, new.max_seq_len
        self.store, self.summary = new.store, new.summary | {"replayed_rows": self.n_old, "replayed": old.summary}
        self.target_counts, self.target_bytes, self.log_prob = new.target_counts, new.target_bytes, None
        identity = f"{new.data_hash} {old.data_hash} {share}"
        self.data_hash = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.new) + self.n_old

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.new[row] if row < len(self.new) else self.old[row - len(self.new)]

    @property
    def lengths(self) -> np.ndarray:
        """(rows of both,) number of pairs in each row."""
        return np.concatenate([self.new.lengths, self.old.lengths])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return the row numbers of an epoch in their order, (len(self),)."""
        with_repetition = self.n_old > len(self.old)
        old_rows = rng.choice(len(self.old), size=self.n_old, replace=with_repetition) + len(self.new)
        return rng.permutation(np.concatenate([np.arange(len(self.new)), old_rows]))
