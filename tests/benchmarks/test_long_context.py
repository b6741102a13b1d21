"""The long-context benchmark at a tiny shape: the same targets everywhere, the scaling that it names, its files."""

import json
import math

import pytest
import torch
import yaml

from benchmarks import long_context
from minillm.config import ModelConfig
from minillm.hub.huggingface import load_model, save_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

TEXTS = ["the cat " * 3, "sat on the mat and " * 5, "on", "then it ran " * 7]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


@pytest.fixture
def flags(tmp_path, tokenizer):
    """A model whose weights are large enough that positions matter, trained (so it says) on rows of 24 tokens."""
    torch.manual_seed(0)
    config = ModelConfig.preset("demo", vocab_size=267, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    save_model(Transformer(config), tmp_path / "model", tokenizer=tokenizer)
    (tmp_path / "model" / "run.yaml").write_text(yaml.safe_dump({"arguments": {"max_seq_len": 24}}))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {
        "model_path": tmp_path / "model", "data_path": tmp_path / "texts.jsonl", "lengths": "48,12,24", "n_scored": 5,
        "n_pieces": 2, "batch_size": 2, "output": tmp_path / "deep" / "long.json",
    }  # fmt: skip


def run(flags, **changes):
    long_context.main([f"--{name}={value}" for name, value in (flags | changes).items()])


def slow_loss(model, ids, n_tokens, n_scored):
    """One target at a time, for one piece, from plain logits."""
    logits = model(torch.tensor([ids[len(ids) - 1 - n_tokens : -1]]))[0].double().log_softmax(-1)
    return sum(-logits[-i, ids[-i]].item() for i in range(1, n_scored + 1)) / n_scored


def test_it_prints_a_table_and_writes_json_and_a_picture(flags, tokenizer, capsys):
    pytest.importorskip("matplotlib")
    run(flags, scalings="none,yarn,linear,dynamic,yarn:3")
    shown = capsys.readouterr().out
    assert "24 (trained)" in shown
    assert "trained on 24 tokens" in shown
    assert flags["output"].with_suffix(".png").stat().st_size > 5000
    written = json.loads(flags["output"].read_text())
    assert written.keys() == {"machine", "arguments", "trained_length", "data", "nats_per_token"}
    nats = written["nats_per_token"]
    assert list(nats) == ["none", "yarn:2", "linear:2", "dynamic:2", "yarn:3"]
    assert all(list(by_length) == ["12", "24", "48"] for by_length in nats.values())
    assert f"{math.exp(nats['linear:2']['48']):.2f}" in shown
    assert nats["dynamic:2"]["24"] == pytest.approx(nats["none"]["24"], abs=1e-5)  # nothing to scale yet
    assert len({round(by_length["48"], 4) for by_length in nats.values()}) == 5
    # Only two texts have 49 tokens with the one before them; the rest of each is too short for another piece.
    encoded = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in (TEXTS[1], TEXTS[3])]
    assert written["data"] == {"pieces": 2, "joined": False, "targets": 10}
    model = load_model(flags["model_path"]).eval()
    for length in (12, 24, 48):
        wanted = sum(slow_loss(model, ids[:49], length, 5) for ids in encoded) / 2
        assert nats["none"][str(length)] == pytest.approx(wanted, abs=1e-5)


def test_short_texts_are_joined(tokenizer):
    pieces, joined = long_context.cut_pieces(TEXTS, tokenizer, n_tokens=150, n_pieces=9)
    stream = [token for text in TEXTS for token in (tokenizer.bos_token_id, *tokenizer.encode(text))]
    assert joined
    assert long_context.cut_pieces(TEXTS, tokenizer, n_tokens=48, n_pieces=3)[1]  # two are not enough
    assert pieces.tolist() == [stream[:151]]
    pieces, joined = long_context.cut_pieces(TEXTS, tokenizer, n_tokens=30, n_pieces=3)
    assert (len(pieces), joined) == (3, False)
    assert tokenizer.bos_token_id not in pieces[:, 1:].flatten().tolist()


def test_where_the_trained_length_comes_from(flags):
    model = load_model(flags["model_path"])
    given = {name: str(value) for name, value in flags.items() if name.endswith("path")}
    assert long_context.trained_length(long_context.Arguments(**given, rope_original_len=7), model) == 7
    assert long_context.trained_length(long_context.Arguments(**given), model) == 24
    (flags["model_path"] / "run.yaml").unlink()
    assert long_context.trained_length(long_context.Arguments(**given), model) == 2048


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scalings": "none,ntk"}, "'ntk' is none of none, linear, dynamic, yarn"),
        ({"scalings": "yarn:x"}, "--rope_scaling yarn:x"),
        ({"lengths": "8,long"}, "--lengths 8,long"),
        ({"lengths": "4"}, "at least --n_scored 5"),
        ({"lengths": "5000"}, "choose shorter ones"),
        ({"factor": 0.5}, "--factor 0.5"),
        ({"n_pieces": 3, "lengths": "300"}, "a piece 301"),
        ({"n_pieces": 0}, "--n_pieces 0"),
        ({"rope_original_len": 9999}, "--rope_original_len 9999"),
        ({"data_path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model_path": "nowhere"}, "make demo"),
    ],
)
def test_mistakes_end_with_one_line(flags, changes, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(flags, **changes)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
