"""benchmarks/moe.py at tiny shapes: the sides do equal work, compute the same, and the figures are written."""

import dataclasses
import json
import re

import pytest
import torch

from benchmarks import moe
from minillm.errors import UserError
from minillm.model import Transformer
from minillm.tokenizer import train_bpe


@pytest.fixture
def files(tmp_path):
    """Flags that name ragged texts and a tokenizer."""
    texts = [" ".join(["the", "old", "house"][(n * k) % 3] for k in range(1, 4 + n % 9)) for n in range(40)]
    for name, part in {"train": texts[:32], "valid": texts[32:]}.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train_bpe(iter(texts), vocab_size=270).save(tmp_path / "tokenizer")
    values = {
        "data_path": tmp_path / "train.jsonl", "valid_path": tmp_path / "valid.jsonl", "device": "cpu",
        "tokenizer_path": tmp_path / "tokenizer", "cache_dir": tmp_path / "cache", "dtype": "float32",
        "hidden_size": 32, "num_hidden_layers": 2, "max_seq_len": 24, "batch_size": 3, "layer_tokens": 50,
        "output": tmp_path / "deep" / "moe.json",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_it_prints_tables_and_writes_json(files, tmp_path, capsys):
    results = moe.main([*files, "--steps", "5", "--seeds", "3,1", "--rounds", "2"])
    shown = capsys.readouterr().out
    assert re.search(r"\d+\.\d\dx as fast as masked, \d+\.\d\dx as fast as picked", shown)
    assert "loss of dense - loss of moe: " in shown
    written = json.loads((tmp_path / "deep" / "moe.json").read_text())
    assert written.keys() == {"machine", "arguments", "layer", "training"}
    assert written["layer"] == results["layer"]
    training = written["training"]
    assert [[run["seed"] for run in runs] for runs in training["runs"].values()] == [[3, 1], [3, 1]]
    losses = {name: [run["loss"] for run in runs] for name, runs in training["runs"].items()}
    gains = [dense - sparse for dense, sparse in zip(losses["dense"], losses["moe"], strict=True)]
    assert training["loss_gain"] == pytest.approx(gains)
    assert training["loss_gain_mean"] == pytest.approx(sum(gains) / 2)
    assert all(0 < run["expert_entropy"] <= 1 <= run["expert_load_max"] for run in training["runs"]["moe"])
    assert all(0 < loss < 6 for each in losses.values() for loss in each)  # ln 270 = 5.6 is where all begin
    assert not (tmp_path / "bench_32").exists()


@pytest.mark.parametrize("preset", ["small", "base", "demo"])
@pytest.mark.parametrize(
    "words, family", [({}, "glm4_moe"), ({"num_experts_per_tok": 1, "n_shared_experts": 2}, "glm4_moe"),
                      ({"scoring_func": "softmax"}, "mixtral")],
)  # fmt: skip
def test_equal_active_size_but_for_the_router(preset, words, family):
    configs = moe.shapes(moe.Arguments(preset=preset, **words))
    sparse, dense = configs["moe"], configs["dense"]
    router = sparse.num_hidden_layers * sparse.hidden_size * sparse.num_experts
    assert sparse.num_parameters(active=True) == dense.num_parameters() + router
    assert sparse.num_parameters() > 1.2 * dense.num_parameters()
    assert sparse.moe_intermediate_size % 8 == 0
    assert (sparse.model_type, dense.num_experts) == (family, 0)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_the_loops_compute_what_the_sorted_layer_does(scoring_func):
    args = moe.Arguments(hidden_size=32, scoring_func=scoring_func)
    config = dataclasses.replace(moe.shapes(args)["moe"], num_experts=8, num_hidden_layers=1)
    torch.manual_seed(0)
    layer = Transformer(config).model.layers[0].mlp.double()
    results = []
    for side in (layer, lambda x: moe.masked_loop(layer, x), lambda x: moe.picked_loop(layer, x)):
        x = torch.randn(2, 13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = side(x)
        out.square().sum().backward()
        results.append([out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for ours, *loops in zip(*results, strict=True):
        for wanted in loops:
            assert float((ours - wanted).norm() / wanted.norm()) <= 1e-12


def test_a_layer_that_computes_something_else_is_not_timed(files, monkeypatch, capsys):
    loop = moe.picked_loop
    monkeypatch.setattr(moe, "picked_loop", lambda layer, x: loop(layer, x) * 1.01)
    with pytest.raises(SystemExit):
        moe.main([*files, "--steps", "0", "--rounds", "1"])
    assert "do not compute the same" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": "1,x"}, "--seeds 1,x: must be whole numbers"), ({"seeds": ""}, "--seeds : must be"),
        ({"steps": -1}, "--steps -1: must not be negative"), ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"data_path": "no/such.jsonl"}, "--data_path no/such.jsonl: does not exist; name one"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured(changes, message):
    with pytest.raises(UserError, match=message):
        moe.Arguments(**changes).check()
    if "data_path" in changes:
        moe.Arguments(steps=0, **changes).check()  # the layer alone needs no data
