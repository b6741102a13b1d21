"""What a run leaves on disk, damaged at a random place: the intact part is found again, and never more than that."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minillm.checkpoints.checkpoint import find_damage, load_state, newest_checkpoint, save_checkpoint
from minillm.objectives.column_cache import cached_columns
from minillm.reports.tracking import read_metrics, truncate_metrics

from .strategies import TIMEOUT_S, as_json, damaged, examples, mutated, scratch, values

pytestmark = pytest.mark.timeout(TIMEOUT_S)
FILES = ("model.safetensors", "nested/config.json", "training_state.pt", "manifest.json")


def write_model(path) -> None:
    (path / "model.safetensors").write_bytes(bytes(range(200)))
    (path / "nested").mkdir()
    (path / "nested" / "config.json").write_text('{"a": 1}')


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 5 and 7; examples work on copies."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (5, 7):
        save_checkpoint(directory, step, write_model, {"step": step, "tensor": torch.arange(4.0) * step}, keep_last=9)
    return directory


def content_of(path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def spoil(data, newest, older) -> None:
    """Change one thing of the checkpoint ``newest``."""
    name = data.draw(st.sampled_from(FILES))
    file = newest / name
    how = data.draw(st.sampled_from(["damage", "damage", "remove", "swap", "of the older", "manifest"]))
    if how == "damage":
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    elif how == "remove":
        file.unlink()
    elif how == "swap":
        other = newest / data.draw(st.sampled_from(FILES))
        one, two = file.read_bytes(), other.read_bytes()
        file.write_bytes(two)
        other.write_bytes(one)
    elif how == "of the older":
        shutil.copy(older / name, file)
    else:
        manifest = newest / "manifest.json"
        manifest.write_bytes(
            data.draw(mutated(st.just(json.loads(manifest.read_bytes()))).map(as_json) | st.binary(max_size=30))
        )


@examples(250)
@given(st.data())
def test_a_damaged_checkpoint_is_named_and_passed_over(two, data):
    with scratch() as folder:
        directory = folder / "checkpoints"
        shutil.copytree(two, directory)
        older, newest = sorted(directory.iterdir())
        before = content_of(newest)
        spoil(data, newest, older)
        after = content_of(newest)
        said = []
        found = newest_checkpoint(directory, report=said.append)
        state = load_state(found)
        payload = [name for name in before if name != "manifest.json"]
        if found == newest:  # then what it holds is what was saved; the manifest may say less or more beside it
            assert [after.get(name) for name in payload] == [before[name] for name in payload]
        else:
            assert found == older
            assert after != before
            assert len(said) == 1
            assert str(newest) in said[0]
            assert find_damage(newest) in said[0]
        assert torch.equal(state["tensor"], torch.arange(4.0) * state["step"])
        assert (state["step"], found.name) in {(5, "step-00000005"), (7, "step-00000007")}


@examples(60)
@given(st.data())
def test_without_an_intact_checkpoint_there_is_none(two, data):
    with scratch() as folder:
        directory = folder / "checkpoints"
        shutil.copytree(two, directory)
        for path in directory.iterdir():
            name = data.draw(st.sampled_from(FILES[:3]))
            (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
        (directory / data.draw(st.sampled_from(["step-", "step-x", "step-00000009"]))).mkdir()
        said = []
        assert newest_checkpoint(directory, report=said.append) is None
        assert len(said) == 3


@examples(60)
@given(st.binary(max_size=60) | values.map(as_json))
@example(b'{"files": {"training_state.pt": 3}}')
@example(b'{"files": [[1, 2], ["training_state.pt", {}]]}')
@example(b'{"files": {"training_state.pt": {"bytes": Infinity, "sha256": ""}}}')
@example(b'{"files": [[1, {"bytes": 1, "sha256": ""}], ["training_state.pt", {"bytes": 1, "sha256": ""}]]}')
@example(b"[" * 100_000)
def test_a_manifest_of_anything_vouches_for_nothing(two, content):
    with scratch() as folder:
        directory = folder / "checkpoints"
        shutil.copytree(two, directory)
        older, newest = sorted(directory.iterdir())
        (newest / "manifest.json").write_bytes(content)
        assert newest_checkpoint(directory, report=lambda line: None) == older


# ---- metrics.jsonl -----------------------------------------------------------------------------------------------

rows = st.builds(
    lambda step, loss, name: {"step": step, "loss": loss, "split": "train", "name": name},
    st.integers(0, 9), st.floats(allow_nan=False), st.text(max_size=5),
)  # fmt: skip
garbage = st.one_of(
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    values.filter(lambda value: not isinstance(value, dict) or "step" not in value).map(as_json),
    rows.flatmap(lambda row: st.integers(1, 10).map(lambda n: as_json(row)[:-n])),
    st.sampled_from([b"\x00" * 20, b"{}", b'{"step": null}', b'{"step": "3"}', b"\xff"]),
)


@examples(150)
@given(st.lists(rows | garbage, max_size=6), st.integers(0, 9), st.binary(max_size=10))
def test_every_whole_row_of_metrics_is_kept(lines, after_step, end):
    whole = [line for line in lines if isinstance(line, dict)]
    content = b"".join((as_json(line) if isinstance(line, dict) else line) + b"\n" for line in lines)
    with scratch() as folder:
        path = folder / "metrics.jsonl"
        path.write_bytes(content + b'{"step": 1, "lo' + end.replace(b"\n", b""))  # killed while it wrote
        assert read_metrics(path) == whole
        truncate_metrics(path, after_step=after_step)
        assert read_metrics(path) == [row for row in whole if after_step and row["step"] <= after_step]
        assert path.read_bytes().count(b"\n") == len(read_metrics(path))


# ---- columns of a frozen model -----------------------------------------------------------------------------------


class Rows:
    """Three ragged rows."""

    fixed_len, data_hash, lengths = None, "ab" * 32, np.array([3, 1, 2])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ids = np.arange(self.lengths[index]) + 10 * index
        return {"input_ids": ids, "targets": ids, "document_ids": np.zeros_like(ids), "position_ids": ids}


def columns_of(folder, **more):
    double = lambda batch: {"double": (2 * batch["input_ids"]).float()}  # noqa: E731
    usual = {"identity": {"weights": "w"}, "compute": double, "bytes_per_position": 4, "flag": "--some_cache"}
    return cached_columns(Rows(), folder, **(usual | more))


@examples(120)
@given(st.data())
def test_a_damaged_cache_is_made_anew(data):
    with scratch() as folder:
        columns_of(folder)
        (place,) = folder.iterdir()
        manifest, column = place / "manifest.json", place / "double.bin"
        how = data.draw(st.sampled_from(["manifest", "manifest", "mutated", "cut", "remove"]))
        if how == "manifest":
            manifest.write_bytes(data.draw(damaged(manifest.read_bytes()) | st.binary(max_size=20)))
        elif how == "mutated":
            whole = json.loads(manifest.read_bytes())
            changed = data.draw(mutated(st.just(whole)))
            assume(changed != whole)
            manifest.write_bytes(as_json(changed))
        elif how == "cut":
            column.write_bytes(column.read_bytes()[: data.draw(st.integers(0, 23))])
        else:
            column.unlink()
        found = columns_of(folder)
        assert [path for path in folder.iterdir() if path.is_dir()] == [place]
        assert [found[row]["double"].tolist() for row in range(3)] == [[0, 2, 4], [20], [40, 42]]
