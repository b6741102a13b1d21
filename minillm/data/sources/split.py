"""``DataFiles``: data files, and which of their records to read: all, or one side of a train/validation split.

A hash of a record's content decides its side, not its position in the file. So the split is the same in every run and
on every rank. Shuffling the file or adding to it moves no record to the other side, and equal records are on the same
side:

    hash of the record, as a number from 0 to 1      0 ........ valid_ratio ............................ 1
                                                       valid                     train

The content is the text or the conversation. For preferences and judged answers it is only the prompt, so that all
answers to one question are on the same side.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.data.schema import Record
from minillm.data.sources.columns import parse_columns
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.raw_records import TXT_DOCUMENT_LEN
from minillm.errors import UserError


@dataclass(frozen=True)
class DataFiles:
    """Data files, and one side of their split. Every function that takes a data path also takes one of these.

    Args:
        path: whatever ``expand_paths`` takes.
        valid_ratio: share of the records to hold out, below 1; with 0 there is no split, and ``side`` has no effect.
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
        """Return ``path`` itself if it is a ``DataFiles``, else all records of the files that it names."""
        return path if isinstance(path, cls) else cls(path)

    def __str__(self) -> str:
        return ", ".join(map(str, self.path)) if isinstance(self.path, (list, tuple)) else str(self.path)

    @property
    def files(self) -> list[Path]:
        """The files, at least one; UserError if ``path`` names none."""
        files = expand_paths(self.path)
        if not files:
            raise UserError("no data file given: set --data_path")
        return files

    @property
    def key(self) -> list:
        """The settings that decide which records are read and how, for hashes; empty without split and columns."""
        split = [self.side, self.valid_ratio] if self.valid_ratio else []
        return split + ([parse_columns(self.columns)] if self.columns else [])

    def takes(self, record: Record) -> bool:
        """Return whether ``record`` is on this side."""
        if not self.valid_ratio:
            return True
        is_held_out = _content_number(record) < self.valid_ratio
        return is_held_out == (self.side == "valid")

    def empty_side(self, n_others: int) -> UserError:
        """Return the error for a side without records, while the other side has ``n_others``."""
        if self.side == "valid":
            records, fix = f"none of the {n_others} usable records of {self}", "raise it, or give --valid_path"
            if ".txt" in str(self):
                fix += f" (a .txt is cut into records at the first blank line after {TXT_DOCUMENT_LEN:,} characters)"
        else:
            records, fix = f"all {n_others} usable records of {self}", "lower it, or give --valid_path"
        return UserError(f"--valid_ratio {self.valid_ratio} holds out {records}: {fix}")


def _content_number(record: Record) -> float:
    """Return a number from 0 to 1 that depends only on the record's content, uniform over different contents."""
    content = record.text if record.kind == "text" else record.messages
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
