"""Which records of the data files are meant: all, or one side of a split into training and validation.

A record is held out by a hash of its content, not by its place in the file. So the split is the same in every run and
on every rank, shuffling the file or adding to it moves no record to the other side, and equal records are never on
both:

    hash of the record, as a number from 0 to 1      0 ........ valid_ratio ............................ 1
                                                       valid                     train

What counts as content is the text or the conversation. Of preferences and judged answers it is the prompt alone, so
that all answers to one question are on one side.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.data.schema import Record
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.files import TXT_DOCUMENT_LEN
from minillm.errors import UserError


@dataclass(frozen=True)
class DataFiles:
    """Data files, and the side of the split that is meant. Every place that takes a path of data takes one of these.

    Args:
        path: a file, a comma-separated list, or a list of either.
        valid_ratio: share of the records that is held out, below 1; 0: none, and ``side`` means nothing.
        side: "train" or "valid".
        columns: the files' names for our keys, such as ``prompt=question`` (see ``columns.py``).
    """

    path: str | Path | list
    valid_ratio: float = 0.0
    side: Literal["train", "valid"] = "train"
    columns: str = ""

    def __post_init__(self):
        if not 0 <= self.valid_ratio < 1:
            raise UserError(f"--valid_ratio {self.valid_ratio}: must be at least 0 and below 1, e.g. 0.01")

    @classmethod
    def of(cls, path: "str | Path | list | DataFiles") -> "DataFiles":
        """Return ``path`` as it is, or all records of the files that it names."""
        return path if isinstance(path, cls) else cls(path)

    def __str__(self) -> str:
        return ", ".join(map(str, self.path)) if isinstance(self.path, (list, tuple)) else str(self.path)

    @property
    def key(self) -> list:
        """What of this decides which records are read and how, for hashes; empty where nothing is asked for."""
        split = [self.side, self.valid_ratio] if self.valid_ratio else []
        return split + ([parse_columns(self.columns)] if self.columns else [])

    def takes(self, record: Record) -> bool:
        """Return whether ``record`` is on this side."""
        return not self.valid_ratio or (_share(record) < self.valid_ratio) == (self.side == "valid")

    def empty_side(self, n_others: int) -> UserError:
        """Return the error for a side without a record; ``n_others`` records are on the other one."""
        if self.side == "valid":
            which, fix = f"none of the {n_others} usable records of {self}", "raise it, or give --valid_path"
            if ".txt" in str(self):
                fix += f" (a .txt is cut into records at the first blank line after {TXT_DOCUMENT_LEN:,} characters)"
        else:
            which, fix = f"all {n_others} usable records of {self}", "lower it, or give --valid_path"
        return UserError(f"--valid_ratio {self.valid_ratio} holds out {which}: {fix}")


def _share(record: Record) -> float:
    """Return a number from 0 to 1 that follows from the record's content alone, uniform over different contents."""
    content = record.text if record.kind == "text" else record.messages
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
