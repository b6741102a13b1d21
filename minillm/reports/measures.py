"""Figures that a loss records besides its value: rewards and margins of preference tuning, for the rows of metrics."""

from collections.abc import Callable

import torch
from torch import Tensor


class Measures:
    """Sums over the things that a loss counts, divided when a row of metrics is due.

    Args:
        names: of the figures, in the order in which they are added up.
        shown: those that the line of a validation shows.
        notes: returns sentences about a row that is not what it should be.
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        *,
        shown: tuple[str, ...] = (),
        notes: Callable[[dict], list[str]] = lambda row: [],
    ):
        self.names, self.shown, self._notes = names, shown, notes
        self._sums: Tensor | None = None  # (2, names): the sums, and how many were added up

    def add(self, **figures: Tensor) -> None:
        """Add the figures of one micro-batch: of each a value per thing, (n,); n may be 0, and differ."""
        if list(figures) != list(self.names):
            raise ValueError(f"the figures are {self.names}, not {tuple(figures)}")
        values = [value.detach() for value in figures.values()]
        wide = torch.float32 if values[0].device.type == "mps" else torch.float64
        sums = torch.stack([value.to(wide).sum() for value in values])
        new = torch.stack([sums, sums.new_tensor([value.numel() for value in values])])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def row(self, ranks) -> dict[str, float]:
        """Return the means since the last call over all ranks, and start over; empty without figures."""
        if not self.names:
            return {}
        if self._sums is None:
            return dict.fromkeys(self.names)
        sums, counts = ranks.sum(self._sums).tolist()
        self._sums = None
        return {name: value / n if n else None for name, value, n in zip(self.names, sums, counts, strict=True)}

    def notes(self, row: dict) -> list[str]:
        """Return what is to be said about a row."""
        return self._notes(row) if row and None not in row.values() else []

    def text(self, row: dict) -> str:
        """Return the figures that are shown to people behind a loss."""
        return "".join(f", {name} {row[name]:.4g}" for name in self.shown if row.get(name) is not None)

    def swap_sums(self, sums: Tensor | None) -> Tensor | None:
        """Put other sums in place and return those that were there: validation counts apart from training."""
        before, self._sums = self._sums, sums
        return before

    def state(self) -> list[list[float]] | None:
        """Return what a checkpoint keeps."""
        return None if self._sums is None else self._sums.tolist()

    def load_state(self, states: list[list[list[float]] | None], ranks) -> None:
        """Go on from those of all ranks; another number of ranks leaves them to the main one."""
        known = [torch.tensor(state, dtype=torch.float64) for state in states if state is not None]
        if len(states) == ranks.world_size and known:
            self._sums = known[ranks.rank]
        elif known:
            self._sums = sum(known) if ranks.is_main else torch.zeros_like(known[0])


NO_MEASURES = Measures()
