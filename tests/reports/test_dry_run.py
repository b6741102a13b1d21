"""--dry_run: the first batch as text with its targets marked, the cost, and no trace left."""

import re

import numpy as np
import pytest
import torch

from minillm import hardware
from minillm.cli.arguments import PretrainArguments
from minillm.config import ModelConfig
from minillm.data import ChatRows, StepBatches, TextRows
from minillm.data.report import CONTEXT, RESET, TARGET
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.model.sizes import describe_parameters
from minillm.tokenizer import train_bpe
from minillm.training.balance import Balance
from minillm.training.run import Run

TALK = '{"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a dog"}]}\n'


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["the fox " * 9]), vocab_size=270)


@pytest.fixture
def make(tmp_path, tokenizer):
    """Call it with rows' class, the file's text and arguments; returns (run, loader)."""

    def make(kind, text, *, n_micro_batches=1, experts=None, **more):
        path = tmp_path / "data.jsonl"
        path.write_text(text, encoding="utf-8")
        rows = kind([path], tokenizer, max_seq_len=40, cache_dir=tmp_path / "cache")
        loader = StepBatches(rows, batch_size=1, global_batch_size=n_micro_batches, shuffle=False)
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **shape, **(experts or {}))).eval()
        run = Run(PretrainArguments(data_path="-", device="cpu", dtype="float32", **more), stage="pretrain")
        run.model, run.balance = model, Balance(model, run.args, run.ranks)
        return run, loader

    return make


def test_every_token_of_a_text_is_a_target_but_the_first(make, tokenizer, capsys):
    run, loader = make(TextRows, '{"text": "the fox\\n\\nsaw"}\n')
    run.dry_run(loader, tokenizer, causal_lm_loss)
    shown = capsys.readouterr().out
    row = shown.split("first row, targets coloured:\n")[1].split("\n\nparameters")[0]
    lines = [f"{TARGET}the fox{RESET}", "", f"{TARGET}saw<|endoftext|>{RESET}"]
    assert row.startswith(f"{CONTEXT}<|endoftext|>{RESET}" + "\n".join(lines))
    assert "documents, " in shown  # the data report comes first
    assert shown.index("most frequent targets") < shown.index("first row")


def test_only_the_answer_of_a_conversation_is_marked(make, tokenizer, capsys):
    run, loader = make(ChatRows, TALK)
    run.dry_run(loader, tokenizer, causal_lm_loss)
    shown = capsys.readouterr().out
    marked = re.findall(re.escape(TARGET) + "(.*?)" + re.escape(RESET), shown, re.S)
    assert marked == ["a dog<|im_end|>"]
    assert "the fox" in shown


def test_the_cost_is_measured_over_all_micro_batches(make, tokenizer, capsys, monkeypatch):
    text = "".join(f'{{"text": "{"the fox " * n}saw"}}\n' for n in (9, 20, 30, 12, 25))
    run, loader = make(TextRows, text, n_micro_batches=2, epochs=3)
    clock = iter([0.0, 99.0, 100.0, 100.5])  # the first pass warms up; the second counts
    monkeypatch.setattr("minillm.reports.dry_run.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(hardware, "memory_bytes", lambda device: 3 * 2**30)
    seen = []

    def loss(model, batch, router_stats):
        assert model.training
        seen.append(batch)
        return causal_lm_loss(model, batch, router_stats)

    run.dry_run(loader, tokenizer, loss)
    shown = capsys.readouterr().out
    n_parameters = sum(p.numel() for p in run.model.parameters())
    n_tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in seen[:2])
    steps = loader.steps_per_epoch
    assert len(seen) == 4
    assert steps > 1
    assert f"parameters: {n_parameters:,}\n" in shown
    assert f"steps: {steps} per epoch, {3 * steps} in all" in shown
    assert f"memory: about {3 + 8 * n_parameters / 2**30:.2f} GiB on cpu" in shown
    assert f"about 0.500 s per step ({n_tokens / 0.5:,.0f} tokens/s and rank)" in shown
    assert f"{3 * steps * 0.5 / 60:.1f} minutes in all" in shown


def test_max_steps_decides_the_total(make, tokenizer, capsys):
    run, loader = make(TextRows, '{"text": "the fox"}\n', epochs=3, max_steps=77)
    run.dry_run(loader, tokenizer, causal_lm_loss)
    assert "steps: 1 per epoch, 77 in all" in capsys.readouterr().out


EXPERTS = {"num_experts": 4, "scoring_func": "sigmoid", "n_shared_experts": 1, "moe_intermediate_size": 8}


def test_frozen_parameters_and_those_of_experts_not_chosen(make, tokenizer, capsys):
    run, loader = make(TextRows, '{"text": "the fox"}\n', experts=EXPERTS)
    run.model.model.norm.weight.requires_grad_(False)
    run.dry_run(loader, tokenizer, causal_lm_loss)
    total = sum(p.numel() for p in run.model.parameters())
    shown = f"parameters: {describe_parameters(run.model)}\n"
    assert "active per token" in shown
    assert f", {total - 16:,} of them trained (" in shown
    assert shown in capsys.readouterr().out


def test_the_loss_of_the_experts_is_part_of_the_step(make, tokenizer):
    """Balance and z-loss cost time and memory too; so they must be in what is measured."""
    run, loader = make(TextRows, '{"text": "the fox"}\n', experts=EXPERTS)
    gradients = []
    run.model.model.layers[0].mlp.gate.weight.register_hook(gradients.append)
    run.dry_run(loader, tokenizer, causal_lm_loss)
    n_tokens = sum(int((batch["document_ids"] >= 0).sum()) for batch in loader.step(0, 0))
    assert run.router_stats.counts.sum() == 2 * 2 * n_tokens  # two passes, two experts per token
    (batch,) = loader.step(0, 0)
    model = run.model.train()
    for stats, same in ((run.router_stats, True), (None, False)):
        causal_lm_loss(model, batch, stats)[0].backward()
        assert torch.equal(gradients[-1], gradients[1]) == same


def test_nothing_is_changed_or_written(make, tokenizer, tmp_path):
    run, loader = make(TextRows, '{"text": "the fox"}\n')
    loader.step(0, 0)
    files = sorted(tmp_path.rglob("*"))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.dry_run(loader, tokenizer, causal_lm_loss)
    assert sorted(tmp_path.rglob("*")) == files
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_other_ranks_are_silent(make, tokenizer, capsys):
    run, loader = make(TextRows, '{"text": "the fox"}\n')
    run.ranks.rank = 1
    run.dry_run(loader, tokenizer, causal_lm_loss)
    assert capsys.readouterr().out == ""


def test_a_row_with_padding_shows_no_padding(make, tokenizer, capsys):
    run, loader = make(TextRows, '{"text": "the fox"}\n')
    (batch,) = loader.step(0, 0)
    assert np.count_nonzero(batch["document_ids"] < 0) > 20
    run.dry_run(loader, tokenizer, causal_lm_loss)
    row = capsys.readouterr().out.split("coloured:\n")[1].split("\n\n")[0]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", row)
    assert plain == "<|endoftext|>the fox<|endoftext|>"
