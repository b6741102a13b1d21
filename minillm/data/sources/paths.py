"""Which data files a path names: a file, a directory, a pattern, or several of them."""

import glob
import os
from pathlib import Path

from minillm.errors import UserError

SUFFIXES = (
    ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet", ".txt", ".txt.gz",
)  # fmt: skip
# Files that Hugging Face datasets puts next to the data.
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def expand_paths(path: str | Path | list | tuple) -> list[Path]:
    """Return the files that ``path`` names, in order.

    ``path`` is one of these, several of them separated by commas, or a list:

    - a file. If a file of that name exists, the name is taken literally, even if it contains a comma or a bracket.
      A file that does not exist is returned unchanged; ``check_file`` refuses it.
    - a directory: its data files, sorted by name, without subdirectories, hidden files and ``.rejected.jsonl``.
    - a pattern, such as ``data/*.jsonl`` or ``data/**/*.parquet``.

    Raises:
        UserError: a directory without a data file, or a pattern that matches none.
    """
    if isinstance(path, (list, tuple)):
        return [file for item in path for file in expand_paths(item)]
    if isinstance(path, Path) or os.path.exists(path):
        return _expand_one(str(path))
    parts = str(path).split(",")
    files: list[Path] = []
    while parts:
        # A file name may contain commas: take the fewest parts that together name something, else one part.
        n_parts = next((n for n in range(1, len(parts) + 1) if _exists(",".join(parts[:n]).strip())), 1)
        name = ",".join(parts[:n_parts]).strip()
        if name:
            files += _expand_one(name)
        parts = parts[n_parts:]
    return files


def _exists(name: str) -> bool:
    """Return whether ``name`` is a file or directory, or a pattern that matches one."""
    if not name:
        return False
    return os.path.exists(name) or (glob.has_magic(name) and next(glob.iglob(name, recursive=True), None) is not None)


def _expand_one(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _is_data(file)]
        if not files:
            raise UserError(
                f"{name} is a directory that holds no data file ({', '.join(SUFFIXES)}): name files, or give a "
                f"pattern such as {path / '**' / '*.jsonl'}"
            )
        return files
    if path.exists() or not glob.has_magic(name):
        return [path]
    files = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if _is_data(Path(match))]
    if not files:
        raise UserError(f"{name} matches no data file: check the pattern ({', '.join(SUFFIXES)})")
    return files


def _is_data(file: Path) -> bool:
    name = file.name
    is_excluded = name.startswith(".") or name.endswith(".rejected.jsonl") or name in NOT_DATA
    return name.endswith(SUFFIXES) and not is_excluded and file.is_file()


def data_suffix(path: Path) -> str:
    """Return the suffix that tells the format, without ``.gz``: ``.jsonl`` for ``a.b.jsonl.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix
