"""What the first pass keeps of all records: their lines in one file, and a few numbers each in arrays, all on disk.

of every record     lines.bin (one line each)  rule  file  line_number
of those that go on                            hash  size  is_valid  row (which record it is)  signature
"""

import contextlib
from pathlib import Path

import numpy as np

from minillm.data.prepare.arrays import open_array
from minillm.data.prepare.exact import HASH
from minillm.data.prepare.near import N_HASHES
from minillm.data.prepare.one_record import Outcome

# Rules in the order in which they are applied; a record's number is its place here, and 0 means that it goes on.
RULES = (
    "", "unreadable", "other_kind", "emptied", "min_characters", "max_characters", "min_tokens", "max_tokens",
    "language", "duplicate_lines", "duplicate_ngrams", "contaminated", "exact_duplicate", "near_duplicate", "leaked",
    "not_sampled", "shared_passage",
)  # fmt: skip
_OF_ALL = {"rule": np.uint8, "file": np.uint32, "line_number": np.uint64}
_OF_ALIVE = {"hash": HASH, "size": np.uint32, "is_valid": np.bool_, "row": np.uint64}


class Store:
    """Writes the arrays in the first pass (a context manager), then reads them.

    Attributes:
        n_records, n_alive: number of records, and of those that go on after the first pass.
    """

    def __init__(self, directory: Path, *, has_signatures: bool):
        self.directory, self.has_signatures = directory, has_signatures
        self.n_records = self.n_alive = 0
        self._open_files = contextlib.ExitStack()

    def __enter__(self) -> "Store":
        names = ["lines", *_OF_ALL, *_OF_ALIVE, *(["signature"] if self.has_signatures else [])]
        self._files = {name: self._open_files.enter_context(self._path(name).open("wb")) for name in names}
        return self

    def __exit__(self, *error) -> None:
        self._open_files.close()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.bin"

    def append(self, outcomes: list[Outcome]) -> None:
        """Add records."""
        alive = [(row, outcome) for row, outcome in enumerate(outcomes, start=self.n_records) if not outcome.rule]
        columns = {
            "rule": [RULES.index(outcome.rule) for outcome in outcomes],
            "file": [outcome.file_index for outcome in outcomes],
            "line_number": [outcome.line_number for outcome in outcomes],
            "size": [outcome.size for _, outcome in alive],
            "is_valid": [outcome.is_valid for _, outcome in alive],
            "row": [row for row, _ in alive],
        }
        for name, values in columns.items():
            np.asarray(values, dtype=(_OF_ALL | _OF_ALIVE)[name]).tofile(self._files[name])
        self._files["hash"].writelines(outcome.hash for _, outcome in alive)
        self._files["lines"].writelines(outcome.line or b"\n" for outcome in outcomes)
        if self.has_signatures and alive:
            np.stack([outcome.signature for _, outcome in alive]).tofile(self._files["signature"])
        self.n_records += len(outcomes)
        self.n_alive += len(alive)

    def column(self, name: str) -> np.ndarray:
        """Return a column as a memory map: of all records, or of those that go on."""
        dtype = (_OF_ALL | _OF_ALIVE)[name]
        n = self.n_records if name in _OF_ALL else self.n_alive
        return open_array(self._path(name), (n,), dtype)

    @property
    def signatures(self) -> np.ndarray:
        """The signatures, (n_alive, N_HASHES) uint32."""
        return open_array(self._path("signature"), (self.n_alive, N_HASHES), np.uint32)

    @property
    def lines_path(self) -> Path:
        """The file of all lines, in the order of the records."""
        return self._path("lines")
