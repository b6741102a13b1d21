"""The three LoRA benchmarks at tiny sizes: they run, compare like with like, and write what they print."""

import json
import math
import re

import pytest
import torch

from benchmarks import common, lora_init, lora_remedies, lora_sweep, lora_trials, lora_vs_peft
from minillm.cli.arguments import LoRAArguments
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe


@pytest.fixture
def world(tmp_path):
    """Flags that name a small random model, conversations to learn and others held out."""
    tokenizer = train_bpe(iter(["who are you a b c d e f"]), vocab_size=267)
    torch.manual_seed(0)
    shape = {"vocab_size": 267, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_model(Transformer(ModelConfig(**shape, num_key_value_heads=2)), tmp_path / "base", tokenizer=tokenizer)
    for name, first, n in (("train", 0, 12), ("valid", 50, 3)):
        turns = [
            [{"role": "user", "content": f"who {number}" * (1 + number % 4)}, {"role": "assistant", "content": "a b"}]
            for number in range(first, first + n)
        ]
        lines = "".join(json.dumps({"conversations": each}) + "\n" for each in turns)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    values = {"base": tmp_path / "base", "data_path": tmp_path / "train.jsonl", "valid_path": tmp_path / "valid.jsonl",
              "num_threads": 1, "max_seq_len": 64, "output": tmp_path / "deep" / "figures.json"}  # fmt: skip
    return tmp_path, [word for name, value in values.items() for word in (f"--{name}", str(value))]


def test_the_sweep_varies_one_setting_and_goes_on_where_it_stopped(world, capsys, monkeypatch):
    folder, flags = world
    monkeypatch.setitem(lora_sweep.SETTINGS, "rank", ("lora_rank", (1,)))
    monkeypatch.setitem(lora_sweep.SETTINGS, "learning rate", ("learning_rate", (1e-30, 1e-2)))
    flags += ["--tests", f"new={folder}/valid.jsonl", "--seeds", "1,2", "--epochs", "2"]
    first = lora_sweep.main([*flags, "--settings", "rank"])
    both = lora_sweep.main([*flags, "--settings", "rank,learning rate", "--learning_rate", "0.002"])
    shown = capsys.readouterr().out
    assert shown.count("rank 1: loss") == 1  # what the page holds is not trained again
    assert both["rank"] == first["rank"]
    assert {len(trials) for points in both.values() for trials in points.values()} == {2}
    losses = {rate: [trial["loss"] for trial in trials] for rate, trials in both["learning rate"].items()}
    assert losses["1e-30"][0] == pytest.approx(losses["1e-30"][1])  # nothing is learnt, so the seed does not matter
    assert max(losses["0.01"]) < min(losses["1e-30"])
    page = (folder / "deep" / "figures.html").read_text()
    assert page.count("<table>") == 2
    assert "data:image/png" in page
    with pytest.raises(SystemExit):
        lora_sweep.main([*flags, "--lora_alpha", "3"])
    assert "holds a sweep with other flags" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result(world):
    folder, _ = world
    flags = {"data_path": folder / "train.jsonl", "max_steps": 6, "learning_rate": 1e30, "grad_clip": 0}
    trial = lora_trials.run_trial(str(folder / "base"), flags | {"max_seq_len": 64}, tests={})
    assert trial["diverged"]
    assert common.over_seeds([trial], "loss") is None
    assert common.shown(None) == "diverged"
    with pytest.raises(UserError, match="no layer is called nothing"):
        lora_trials.run_trial(str(folder / "base"), flags | {"target_modules": "nothing"}, tests={})


def test_mean_and_spread():
    assert common.over_seeds([{"loss": 1.0}, {"loss": 3.0}], "loss") == (2.0, pytest.approx(math.sqrt(2)))
    assert common.shown((2.0, 0.5), ".1f") == "2.0 ± 0.5"


def test_initialisations_are_compared_at_their_best_rates(world, capsys):
    folder, flags = world
    flags += ["--steps", "10", "--seeds", "1,2", "--learning_rates", "1e-30,3e-2", "--lora_rank", "4"]
    result = lora_init.main([*flags, "--inits", "kaiming,orthogonal", "--max_new_tokens", "4"])
    shown = capsys.readouterr().out
    assert set(result["runs"]) == {"kaiming", "orthogonal"}
    for init, found in result["runs"].items():
        assert len(found["trials"]) == 2
        assert found["learning_rate"] == 3e-2
        first = found["gradients"][0][1]
        # The claim is true of the first step: B of zeros gives A no gradient; any other start gives it one.
        assert (first["ratio"] == float("inf")) == (init == "kaiming")
        assert 0 < found["gradients"][0][10]["ratio"] < float("inf")
    assert re.search(r"kaiming +0.03 ", shown)
    assert (folder / "deep" / "figures.json").is_file()


@pytest.mark.parametrize(("best", "tried"), [(0, 3), (2, 5), (-3, 6), (40, 8)])
def test_the_best_rate_has_a_worse_one_on_either_side(best, tried):
    calls = []

    def loss_of(rate):
        power = round(math.log2(rate / 3e-3))
        calls.append(power)
        return math.inf if power > 3 and best < 3 else abs(power - best)

    rate, losses = lora_remedies.climb(loss_of, 3e-3)
    power = min(best, lora_remedies.MAX_STEPS_OF_RATE)  # it does not climb for ever
    assert rate == pytest.approx(3e-3 * 2.0**power)
    assert len(calls) == len(set(calls)) == len(losses) == tried  # no rate twice
    assert list(losses) == sorted(losses)


def test_remedies_are_flags_of_train_lora():
    for flags in lora_remedies.REMEDIES.values():
        LoRAArguments(data_path=__file__, **flags).check()


def test_remedies_are_compared_at_their_best_rates(world, capsys, monkeypatch):
    folder, flags = world
    monkeypatch.setattr(lora_remedies, "MAX_STEPS_OF_RATE", 1)
    flags += ["--steps", "4", "--seeds", "1,2", "--learning_rate", "3e-2", "--lora_rank", "4"]
    result = lora_remedies.main([*flags, "--remedies", "plain,balanced,orthogonal", "--max_new_tokens", "4"])
    shown = capsys.readouterr().out
    assert set(result["remedies"]) == {"plain", "balanced", "orthogonal"}
    for name, found in result["remedies"].items():
        losses = found["tuning"]
        assert len(losses) == 3
        assert found["learning_rate"] == min(losses, key=losses.get)
        assert len(found["trials"]) == 2
        assert found["trials"][0]["loss"] == losses[found["learning_rate"]]
        assert re.search(rf"\n *{name} +{found['learning_rate']:g} ", shown)
    first = {name: found["trials"][0]["gradients"][1]["ratio"] for name, found in result["remedies"].items()}
    assert first["orthogonal"] < float("inf")  # the only one whose B is not zero at the start
    assert {first[name] for name in first.keys() - {"orthogonal"}} == {float("inf")}
    assert (folder / "deep" / "figures.json").is_file()


def test_peft_and_both_of_ours_begin_at_the_same_loss(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(lora_vs_peft.SHAPES, "demo", ("demo", 64, 4))
    output = tmp_path / "deep" / "peft.json"
    flags = ["--families", "qwen3", "--shapes", "demo", "--dtypes", "float32", "--dropouts", "0.1", "--rounds", "1"]
    (case,) = lora_vs_peft.main([*flags, "--num_threads", "1", "--output", str(output)])
    assert max(case["losses"].values()) - min(case["losses"].values()) < 1e-3
    assert case["memory"]["minillm"] < 1  # memory does not drift with the machine
    assert set(case["speed"]) == {"peft", "minillm", "ours", "limit"}
    assert re.search(r"qwen3 +demo +float32 +0\.1 +\d", capsys.readouterr().out)
    assert output.is_file()
