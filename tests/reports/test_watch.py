"""The file, the picture and the messages of ``--monitor``."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from minillm.config import ModelConfig
from minillm.lora import apply_lora, lora_parameters
from minillm.model import Transformer
from minillm.reports.tracking import read_metrics
from minillm.reports.watch import FIGURES, Watch, target_table, target_warnings
from minillm.tokenizer import train_bpe

CONFIG = ModelConfig(vocab_size=290, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)

pytestmark = pytest.mark.usefixtures("real_pictures")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the cat sat on the mat"] * 20), vocab_size=279)


class FakeRun:
    """What ``Watch`` needs of a run: a model, a directory, and something that prints."""

    def __init__(self, directory):
        torch.manual_seed(0)
        self.model = Transformer(CONFIG)
        apply_lora(self.model, rank=3, generator=torch.Generator().manual_seed(1))
        self.directory, self.printed = directory, []

    def watch(self, tokenizer, rows, **options):
        return Watch(self.model, self.directory, tokenizer, rows, report=self.printed.append, **options)


def even_rows():
    return SimpleNamespace(target_counts=np.arange(290) % 7)


def train(run, watch, steps, lr=1e-3):
    optimizer = torch.optim.AdamW(lora_parameters(run.model), lr=lr)
    for step in steps:
        optimizer.zero_grad()
        run.model(torch.randint(290, (2, 7), generator=torch.Generator().manual_seed(step))).square().mean().backward()
        watch.before_update(step)
        optimizer.step()
        watch.after_update(step, optimizer)


def test_rows_picture_and_notes(tmp_path, tokenizer):
    run = FakeRun(tmp_path)
    watch = run.watch(tokenizer, even_rows(), interval=3)
    train(run, watch, range(1, 8))
    watch.finish()
    rows = read_metrics(tmp_path / "monitor.jsonl")
    assert [row["step"] for row in rows] == [1, 3, 6]
    assert set(rows[0]["layers"]) == {name for name, _ in run.model.named_modules() if name.endswith("_proj")}
    assert any(line.startswith("adapter: median over layers") for line in run.printed[-2:])
    with Image.open(tmp_path / "monitor.png") as picture:
        assert picture.size == (1600, 800)
        colors = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colors) > 50  # curves, not an empty page


def test_the_page_shows_the_last_look_and_the_targets(tmp_path, tokenizer):
    run = FakeRun(tmp_path)
    counts = np.zeros(290, dtype=np.int64)
    counts[tokenizer.token_id("<|im_end|>")], counts[100], counts[99] = 30, 60, 10
    watch = run.watch(tokenizer, SimpleNamespace(target_counts=counts), interval=3)
    assert watch.sections() == []
    train(run, watch, range(1, 8))
    watch.finish()
    adapter, targets = watch.sections()
    assert adapter.title == "Adapter at step 6"
    assert adapter.picture.is_file()
    head, *rows = adapter.rows
    assert [row[0] for row in rows] == [f"{kind}_proj (2)" for kind in ("q", "k", "v", "o", "gate", "up", "down")]
    (last,) = [row for row in read_metrics(tmp_path / "monitor.jsonl") if row["step"] == 6]
    for kind, *cells in rows:
        layers = [figures for name, figures in last["layers"].items() if name.endswith(kind.split()[0])]
        for key, name in FIGURES.items():
            assert cells[head.index(name) - 1] == f"{np.median([layer[key] for layer in layers]):.3g}", (kind, key)
    assert [row[2:] for row in targets.rows[1:]] == [["60", "60.0%"], ["30", "30.0%"], ["10", "10.0%"]]
    assert [row[0].endswith("*") for row in targets.rows[1:]] == [False, True, False]
    assert targets.rows[2][1] == "'<|im_end|>'"


def test_as_many_targets_as_asked_for(tokenizer):
    rows = target_table(np.arange(200), tokenizer, n=3)
    assert [row[0].rstrip("*") for row in rows] == ["id", "199", "198", "197"]
    assert target_table(np.zeros(200, dtype=np.int64), tokenizer) == rows[:1]


def test_a_new_run_begins_a_new_file_and_a_resumed_one_goes_on(tmp_path, tokenizer):
    (tmp_path / "monitor.jsonl").write_text('{"step": 99, "layers": {}}\n')
    run = FakeRun(tmp_path)
    watch = run.watch(tokenizer, even_rows(), interval=2)
    train(run, watch, range(1, 5))
    state = json.loads(json.dumps(watch.state()))  # plain values
    train(run, watch, range(5, 9))  # these are lost: the checkpoint is older
    later = run.watch(tokenizer, even_rows(), interval=2)
    later.load_state(state)
    train(run, later, range(5, 7))
    assert [row["step"] for row in read_metrics(tmp_path / "monitor.jsonl")] == [1, 2, 4, 6]
    unwatched = run.watch(tokenizer, even_rows(), interval=2)
    unwatched.load_state(None)
    train(run, unwatched, range(5, 7))
    assert [row["step"] for row in read_metrics(tmp_path / "monitor.jsonl")] == [6]


def test_warnings_are_printed_and_kept(tmp_path, tokenizer):
    run = FakeRun(tmp_path)
    counts = np.zeros(290, dtype=np.int64)
    counts[tokenizer.token_id("<|im_end|>")], counts[100] = 43, 57
    watch = run.watch(tokenizer, SimpleNamespace(target_counts=counts), interval=1)
    train(run, watch, range(1, 6), lr=0.3)
    rows = read_metrics(tmp_path / "monitor.jsonl")
    first, *others = [warning for row in rows for warning in row["warnings"]]
    assert first.startswith("special tokens are 43% of your targets")
    assert others[0].startswith("one token, ")
    assert any("update ratio" in warning for warning in others)
    said = [f"warning, step {row['step']}: {warning}" for row in rows for warning in row["warnings"]]
    assert run.printed == said


def test_with_replayed_data_no_warning_advises_to_mix_in_old_data(tmp_path, tokenizer):
    run = FakeRun(tmp_path)
    train(run, run.watch(tokenizer, even_rows(), interval=1, replays=True), range(1, 6), lr=0.3)
    said = [line for line in run.printed if "lower the learning rate" in line]
    assert any("update ratio" in line for line in said)
    assert not any("old data" in line for line in said)


def test_ordinary_targets_give_no_warning(tokenizer):
    assert target_warnings(np.arange(290) % 7, tokenizer) == []
    assert target_warnings(np.zeros(290, dtype=np.int64), tokenizer) == []


def test_one_look_is_drawn_and_none_is_not(tmp_path, tokenizer):
    run = FakeRun(tmp_path)
    watch = run.watch(tokenizer, even_rows(), interval=100)
    watch.finish()
    assert not list(tmp_path.iterdir())
    assert run.printed == []
    train(run, watch, range(1, 3))  # A has no gradient yet, so there is no ratio
    watch.finish()
    assert (tmp_path / "monitor.png").stat().st_size > 1000


def test_without_matplotlib_nothing_else_is_lost(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = FakeRun(tmp_path)
    watch = run.watch(tokenizer, even_rows(), interval=1)
    train(run, watch, range(1, 3))
    watch.finish()
    assert run.printed[-1] == "no monitor.png: drawing needs matplotlib: pip install matplotlib"
    assert len(read_metrics(tmp_path / "monitor.jsonl")) == 2
