"""``prepare``: two passes over the data, and outputs that are complete or absent.

    first pass    every record is read, cleaned and judged alone           first_pass.py, one_record.py, rules.py
    choice        duplicates, mixture, sample, split, from numbers alone   choose.py, exact.py, near.py
    held out      which held-out records share a passage with training     held_out.py
    second pass   the chosen records are written, shuffled if asked        write.py

Temporary files lie in a directory of their own. When all is written, each output is renamed to its place, the report
last: it has the hashes of the others. What a killed run leaves behind, the next one to the same place removes.
"""

import codecs
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np

from minillm.data.cache.atomic_directory import remove_orphans, temporary_path
from minillm.data.prepare.choose import Choice, choose
from minillm.data.prepare.counts import Counts, format_counts
from minillm.data.prepare.first_pass import clean_all, first_kind, read_raw_records
from minillm.data.prepare.held_out import treat_shared_passages
from minillm.data.prepare.near import check_package
from minillm.data.prepare.one_record import Cleaner
from minillm.data.prepare.overlap import Overlap, read_questions
from minillm.data.prepare.settings import PrepareSettings
from minillm.data.prepare.sources import Source, convert_to_utf8, parse_sources
from minillm.data.prepare.store import RULES, Store
from minillm.data.prepare.write import write_outputs
from minillm.data.sources.paths import expand_paths
from minillm.data.sources.raw_records import check_file
from minillm.errors import UserError
from minillm.files import sha256
from minillm.terminal import progress
from minillm.tokenizer import load_tokenizer


def prepare(settings: PrepareSettings) -> dict:
    """Prepare data files as the settings say; return the report, which is also written as OUTPUT.report.json.

    Raises:
        UserError: a wrong setting, an unreadable file, an output that exists, a full disk, or no record left. Then no
            output is written or changed.
    """
    settings.check()
    sources = parse_sources(settings.data_path, encoding=settings.encoding)
    if settings.max_records and sources[0].share is not None:
        raise UserError(
            f"--max_records {settings.max_records} with shares: give --weight_unit records --mix_size "
            f"{settings.max_records} instead"
        )
    against = [check_file(file) for file in expand_paths(settings.against)] if settings.against else []
    _check_paths(settings, sources, against)
    if settings.near_duplicates == "drop":
        check_package()
    if settings.counts_tokens:
        load_tokenizer(settings.tokenizer_path)  # a wrong path ends here, not in a worker
    train = settings.paths["train"]
    work_parent = Path(settings.work_dir) if settings.work_dir else train.parent
    try:
        with _temporary(train) as new_dir, _temporary(work_parent / f"{train.name}.work") as work_dir:
            report, new_files = _prepare(settings, sources, against, new_dir, work_dir)
            _publish(settings, new_files)
            return report
    except OSError as error:
        where = error.filename or work_parent
        raise UserError(
            f"cannot write {where}: {error.strerror or error}; make room, or choose another --output or --work_dir"
        ) from None


@contextlib.contextmanager
def _temporary(final: Path) -> Iterator[Path]:
    """Make a directory next to ``final``, and remove it in the end, with those of killed runs."""
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(final)
    directory = temporary_path(final)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _check_paths(settings: PrepareSettings, sources: list[Source], against: list[Path]) -> None:
    """Refuse to write over an existing file without --overwrite, and over an input in any case."""
    inputs = {file.resolve() for file in (*(file for source in sources for file in source.files), *against)}
    for path in settings.written_paths.values():
        if path.resolve() in inputs:
            raise UserError(f"--output {settings.output}: {path} is also read; choose another name")
        if path.is_dir():
            raise UserError(f"--output {settings.output}: {path} is a directory; choose another name")
        if path.exists() and not settings.overwrite:
            raise UserError(f"--output {settings.output}: {path} exists already; give --overwrite, or another name")


def _prepare(
    settings: PrepareSettings, sources: list[Source], against: list[Path], new_dir: Path, work_dir: Path
) -> tuple[dict, dict[str, Path]]:
    """Return the report, and the complete new files in ``new_dir`` by their role."""
    # The records of --against come first, so that duplicates among the others are duplicates of them.
    originals = [*against, *(file for source in sources for file in source.files)]
    names = [str(file) for file in originals]
    source_of_file = np.array([-1] * len(against) + [i for i, source in enumerate(sources) for _ in source.files])
    files = _readable_files(settings, originals, len(against), work_dir)
    kind = first_kind(files[len(against) :], settings.columns) if settings.kind == "auto" else settings.kind
    questions = None
    if settings.eval_files:
        questions = Overlap(read_questions(settings.eval_files), ngram=settings.eval_ngram)
    counts = Counts()
    store = Store(work_dir, has_signatures=settings.near_duplicates == "drop")
    raw_records = chain.from_iterable(
        read_raw_records(index, file, name, is_reference=index < len(against))
        for index, (file, name) in enumerate(zip(files, names, strict=True))
    )
    cleaner = partial(Cleaner, settings, kind=kind, questions=questions)
    with store, progress(desc="reading", unit=" records") as bar:
        for outcomes in clean_all(raw_records, cleaner, settings.num_workers):
            store.append(outcomes)
            bar.update(len(outcomes))
            counts.add(outcomes, names, n_reference_files=len(against))
    source_of = source_of_file[store.column("file")[store.column("row")]]
    choice = choose(store, settings, sources, source_of, work_dir)
    passages = None
    if settings.valid_ratio and settings.valid_overlap != "ignore":
        passages = treat_shared_passages(store, choice, settings)
    counts.dropped["not_sampled"] = int((choice.rule == RULES.index("not_sampled")).sum())

    def on_drop(file_index: int, entry: dict) -> bool:
        is_ours = file_index >= len(against)
        if is_ours:
            counts.drop(entry["rule"], entry)
        return is_ours

    outputs = write_outputs(store, choice, settings, names, new_dir, work_dir, on_drop)
    paths = settings.written_paths
    report = {
        "kind": kind,
        "settings": settings.as_dict(),
        "packages": {"rensa": version("rensa")} if store.has_signatures else {},
        "inputs": [{"path": str(f), "bytes": f.stat().st_size, "sha256": sha256(f)} for f in originals],
        **counts.as_dict(),
        "mixture": choice.mixture,
        "questions": questions and {"looked_for": questions.n_texts - questions.n_too_short,
                                    "too_short": questions.n_too_short},
        "leakage": _leakage(store, choice) | {"passages": passages} if settings.valid_ratio else None,
        "outputs": {str(paths[role]): output.describe() for role, output in outputs.items() if role in paths},
    }  # fmt: skip
    for role, output in outputs.items():
        if role in paths and not output.n_records:
            print(format_counts(report))
            raise UserError(f"{_why_empty(role, settings, counts, passages)} (no file was written)")
    (new_dir / "report").write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report, {role: new_dir / role for role in paths}


def _readable_files(settings: PrepareSettings, originals: list[Path], n_against: int, work_dir: Path) -> list[Path]:
    """Return the files, those of --data_path converted to UTF-8 if they have another encoding."""
    if codecs.lookup(settings.encoding).name == "utf-8":
        return originals
    return originals[:n_against] + [
        convert_to_utf8(file, settings.encoding, work_dir / f"utf8_{index}")
        for index, file in enumerate(originals[n_against:])
    ]


def _leakage(store: Store, choice: Choice) -> dict:
    """Return how many records of the training side equal a held-out one."""
    hashes = store.column("hash")["high"]  # 64 bits are enough for a count
    return {"exact": int(np.isin(hashes[choice.copies > 0], hashes[choice.is_valid]).sum())}


def _why_empty(role: str, settings: PrepareSettings, counts: Counts, passages: dict | None) -> str:
    most = max(counts.dropped, key=lambda rule: counts.dropped[rule])
    if role == "valid" and passages and passages["sharing"]:
        return (
            f"--valid_overlap {settings.valid_overlap} leaves no held-out record: each shares a passage with a "
            "training record; give --near_duplicates drop, raise --valid_ratio, or give --valid_overlap report"
        )
    if role == "valid":
        return f"--valid_ratio {settings.valid_ratio} holds out none of the records that are left: raise it"
    if not counts.dropped[most]:
        return f"--valid_ratio {settings.valid_ratio} holds out all records that are left: lower it"
    return (
        f"no record of {settings.data_path} is left: the table above counts what each rule dropped, "
        f"most of all {most} ({counts.dropped[most]:,} of {counts.read:,}); loosen that rule"
    )


def _publish(settings: PrepareSettings, new_files: dict[str, Path]) -> None:
    """Rename the new files to their places, the report last; remove what an earlier run wrote and this one does not."""
    paths = settings.paths
    for file in new_files.values():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    is_earlier_run = paths["report"].exists()
    paths["report"].unlink(missing_ok=True)
    for role, path in paths.items():
        if role in new_files:
            new_files[role].replace(path)
        elif is_earlier_run:
            path.unlink(missing_ok=True)
