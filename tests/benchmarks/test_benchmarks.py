"""The benchmarks at tiny shapes: they run, print a ratio, write their JSON, and compare like with like."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import allocator, common, hf_parity, packing, train_step
from minillm.config import ModelConfig
from minillm.hub.huggingface import save_model
from minillm.model import Transformer
from minillm.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]
SIDES = ["packed", "padded", "fixed_rows", "sorted"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """(file of 200 conversations of very different lengths, directory of a tokenizer)."""
    directory = tmp_path_factory.mktemp("chats")
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        question, answer = ("x y " * int(n) for n in rng.integers(1, [4, 10]))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"conversations": turns}))
    (directory / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    train_bpe(iter(["x y x y"]), vocab_size=268).save(directory / "tokenizer")
    return directory / "chats.jsonl", directory / "tokenizer"


def packing_flags(chats, directory: Path, **changes) -> list[str]:
    data, tokenizer = chats
    values = {
        "data_path": data, "tokenizer_path": tokenizer, "cache_dir": directory / "cache", "max_seq_len": 160,
        "batch_size": 3, "accumulation_steps": 2, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rounds": 1, "steps_per_round": 2, "output": directory / "deep" / "packing.json",
    }  # fmt: skip
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture(params=[False, True], ids=["causal", "padding_mask"])
def plans(request, chats, tmp_path):
    args = packing.parse(packing.Arguments, packing_flags(chats, tmp_path, padding_mask=request.param))
    return packing.make_plans(args, packing.load_tokenizer(args.tokenizer_path))


def test_packing_prints_ratios_and_writes_json(chats, tmp_path):
    """As a user runs it: as a script, from another directory."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "packing.py"), *packing_flags(chats, tmp_path)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines if re.fullmatch(r"\d+\.\d\dx", line[-1])] == SIDES
    written = json.loads((tmp_path / "deep" / "packing.json").read_text())
    assert written.keys() == {"machine", "arguments", "data", "results"}
    assert written["machine"].keys() == {"torch", "threads", "processor", "cpu_capability", "gpu"}
    assert written["data"].keys() == {"conversations", "tokens", "targets", "median_tokens", "longest"}
    assert list(written["results"]) == SIDES
    for side in written["results"].values():
        assert side.keys() == {
            "micro_batches", "positions_per_micro_batch", "padding_share", "tokens_per_s", "targets_per_s",
            "packed_ratio",
        }  # fmt: skip
        assert side["tokens_per_s"] > side["targets_per_s"] > 0
    assert written["results"]["packed"]["packed_ratio"] == 1.0


def test_every_side_sees_every_token_once_within_the_budget(plans):
    everything = sorted(plans["padded"].rows.lengths.tolist())
    n_targets = plans["padded"].rows.n_targets
    assert list(plans) == SIDES
    for name, plan in plans.items():
        numbers = np.concatenate(plan.micro_batches)
        assert sorted(numbers.tolist()) == list(range(len(plan.rows))), name
        n_tokens = n_positions = seen_targets = 0
        for index in range(len(plan.micro_batches)):
            batch, n = plan.batch(index)
            assert batch["input_ids"].numel() <= 3 * 160, name
            n_tokens, n_positions = n_tokens + n, n_positions + batch["input_ids"].numel()
            seen_targets += int((batch["targets"] != -100).sum())
            if "document_ids" in batch:
                assert n == int((batch["document_ids"] >= 0).sum()), name
            else:
                assert name in ("padded", "fixed_rows")
        assert n_tokens == sum(everything), name
        assert seen_targets == n_targets, name
        assert plan.n_positions() == n_positions, name
        assert plan.padding_share() == pytest.approx(1 - n_tokens / n_positions, abs=1e-12)
    share = {name: plan.padding_share() for name, plan in plans.items()}
    assert share["packed"] < share["sorted"] < share["padded"]


def test_padded_rows_are_in_random_order_and_sorted_ones_are_not(plans):
    def n_in_order(plan):
        lengths = [plan.rows.lengths[numbers] for numbers in plan.micro_batches]
        return sum(bool((np.diff(row) <= 0).all()) for row in lengths) / len(lengths)

    assert n_in_order(plans["sorted"]) == 1.0
    assert n_in_order(plans["padded"]) < 0.5


def test_budget_is_filled_but_not_passed():
    lengths = np.array([5, 1, 1, 10, 2, 2, 3, 10])
    cut = packing.cut_to_budget(np.array([1, 2, 0, 4, 3, 6, 5, 7]), lengths, 15)
    assert [piece.tolist() for piece in cut] == [[1, 2, 0], [4], [3], [6, 5], [7]]


def test_sides_compute_the_same_loss_and_a_difference_is_found(plans, monkeypatch):
    torch.manual_seed(1)
    model = Transformer(ModelConfig.preset("demo", vocab_size=268, hidden_size=16, num_hidden_layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # fresh weights barely attend to anything
    batch = plans["packed"].batch(0)[0]
    assert int(batch["document_ids"].max()) > 0
    packing.check_same_loss(model, batch)
    one_document = batch | {"document_ids": batch["document_ids"].clamp(max=0)}
    apart = packing.unpack(batch)
    monkeypatch.setattr(packing, "unpack", lambda _: apart)
    with pytest.raises(packing.UserError, match="do not compute the same"):
        packing.check_same_loss(model, one_document)


@pytest.mark.parametrize("peers", ["", "transformers"])
def test_train_step_prints_a_ratio_and_writes_json(peers, tmp_path, capsys):
    if peers:
        pytest.importorskip("transformers")
    output = tmp_path / "deep" / "step.json"
    flags = {
        "shapes": "demo", "dtypes": "float32", "rounds": 1, "seq_len": 24, "batch_size": 2, "documents_per_row": 3,
        "peers": peers, "output": output,
    }  # fmt: skip
    train_step.main([f"--{name}={value}" for name, value in flags.items()])
    table = capsys.readouterr().out
    assert "ours tok/s" in table
    assert bool(re.search(r"\d\.\d\dx", table)) == bool(peers)
    written = json.loads(output.read_text())
    assert written.keys() == {"machine", "arguments", "results"}
    (row,) = written["results"]
    assert {"shape", "dtype", "tokens_per_s", "ratio", "ratio_to_best", "share_of_matrix_rate"} <= row.keys()
    assert list(row["ratio"]) == ([peers] if peers else [])
    assert row["tokens_per_s"]["ours"] > 0


def test_hf_parity_counts_what_is_equal_and_fails_on_a_difference(chats, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    data, tokenizer = chats
    torch.manual_seed(2)
    config = ModelConfig.preset("demo", vocab_size=268, hidden_size=16, num_hidden_layers=2)
    model, tokenizer = Transformer(config), hf_parity.load_tokenizer(tokenizer)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    flags = ["--model_path", str(tmp_path / "model"), "--data_path", str(data), "--n_prompts", "7"]
    hf_parity.main([*flags, "--max_new_tokens", "5", "--output", str(tmp_path / "parity.json")])
    assert "of 7 prompts 7 have equal ids and 7 equal greedy answers" in capsys.readouterr().out
    assert json.loads((tmp_path / "parity.json").read_text())["logits"] <= 1e-5
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    monkeypatch.setattr(hf_parity, "load_model", lambda path: model)
    with pytest.raises(SystemExit) as stopped:
        hf_parity.main([*flags, "--max_new_tokens", "5", "--output", ""])
    assert stopped.value.code == 1


def test_allocator_measures_each_setting_in_its_own_process(tmp_path, capsys, monkeypatch, python):
    monkeypatch.setattr(sys, "executable", python)
    output = tmp_path / "allocator.json"
    allocator.main(["--rounds", "1", "--steps", "1", "--peers", "", "--output", str(output)])
    assert re.search(r"kept .*\d\.\d\dx", capsys.readouterr().out)
    faults = json.loads(output.read_text())["faults"]  # how many each setting has: tests/test_hardware.py
    assert {"ours:kept", "ours:default"} <= set(faults)
    assert all(len(rounds) == 1 and rounds[0] >= 0 for rounds in faults.values())


def test_ratios_are_medians_of_the_rounds_own():
    assert common.median_ratio([2.0, 30.0, 400.0], [1.0, 10.0, 200.0]) == 2.0
    assert [common.turns(["a", "b", "c"], turn)[0] for turn in range(4)] == ["a", "b", "c", "a"]
    assert sorted(common.turns(["a", "b", "c"], 2)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--batch_size", "0"], "--batch_size 0"),
        (["--dtype", "float16"], "--dtype float16: choose from float32, bfloat16"),
        (["--data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--output", "/dev/null/x.json"], "cannot write --output"),
    ],
)
def test_mistakes_end_with_one_line(flags, message, chats, tmp_path, capsys):
    given = {flags[0].removeprefix("--"): flags[1]}
    with pytest.raises(SystemExit) as stopped:
        packing.main(packing_flags(chats, tmp_path, **given))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
