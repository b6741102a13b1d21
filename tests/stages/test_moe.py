"""A mixture of experts through the stages: pretrained, fine-tuned, looked at, opened by transformers."""

import pytest
import torch
import yaml

import eval_model
import train_pretrain
import train_sft
from minillm.hub.huggingface import load_model
from minillm.model.sizes import describe_parameters
from minillm.reports.tracking import read_metrics

EXPERTS = ["--use_moe", "--num_experts", "5", "--moe_intermediate_size", "24", "--first_k_dense_replace", "1"]
DATA = ["--max_seq_len", "48", "--batch_size", "3", "--accumulation_steps", "2", "--learning_rate", "3e-3"]


@pytest.fixture(scope="module")
def finished(make_world, tmp_path_factory, flags):
    """A dense and a sparse model of the same width, pretrained for five steps each."""
    world = make_world(tmp_path_factory.mktemp("moe"))
    argv = ["--data_path", str(world.text), "--valid_path", str(world.text_valid), *DATA, "--max_steps", "5"]
    argv += ["--log_interval", "2", "--save_interval", "2"]
    train_pretrain.main([*flags(world), *argv])
    world.result = train_pretrain.main([*flags(world), *argv, *EXPERTS])
    world.run = world.out / "pretrain_32_moe"
    return world


def test_it_lies_beside_the_dense_model(finished):
    assert load_model(finished.out / "pretrain_32").config.num_experts == 0
    model = load_model(finished.run)
    assert (model.config.model_type, model.config.num_experts) == ("glm4_moe", 5)
    biases = dict(model.named_buffers())
    assert list(biases) == ["model.layers.1.mlp.gate.e_score_correction_bias"]  # the first block is dense
    (bias,) = biases.values()
    steps = (bias / 1e-3).round()
    assert bias.any()
    assert torch.allclose(bias, steps * 1e-3)  # whole steps of --router_bias_update_speed
    assert steps.abs().max() <= 5


def test_metrics_and_run_yaml(finished):
    rows = read_metrics(finished.run / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [2, 4, 5]
    for row in train:
        (share,) = row["expert_share"]
        assert sum(share) == pytest.approx(1, abs=1e-4)  # five digits are written
        assert row["expert_load_max"] == pytest.approx(max(share) * 5, abs=1e-4)
        assert 0.5 < row["expert_entropy"] <= 1
        assert row["balance_loss"] > 0.9  # 1 is an even load
        assert row["dropped"] == 0
    (valid,) = (row for row in rows if row["split"] == "valid")
    assert not any("expert" in name or "balance" in name for name in valid)
    content = yaml.safe_load((finished.run / "run.yaml").read_text())
    config = load_model(finished.run).config
    assert content["n_parameters"] == config.num_parameters()
    assert content["n_active_parameters"] == config.num_parameters(active=True) < config.num_parameters()


@pytest.mark.parametrize("where", [".", "best", "checkpoints/step-00000005"])
def test_transformers_opens_it_with_equal_logits(finished, where):
    transformers = pytest.importorskip("transformers")
    ours = load_model(finished.run / where).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished.run / where, dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_fine_tuning_starts_from_it(finished, call):
    argv = ["--data_path", finished.chat, *DATA, "--max_steps", "2", "--log_interval", "1"]
    done = call(train_sft.main, finished, *argv, "--use_moe")
    assert done.code == 0, done.err
    total, active = (load_model(finished.run).config.num_parameters(active=active) for active in (False, True))
    assert f"full_sft_32_moe, parameters: {total:,} ({active:,} active per token" in done.out
    assert (finished.out / "full_sft_32_moe" / "model.safetensors").is_file()


@pytest.mark.parametrize("width", [[], ["--hidden_size", "32"]])
@pytest.mark.parametrize("words, name", [([], "pretrain_32:"), (["--use_moe"], "pretrain_32_moe:")])
def test_evaluation_finds_it_by_its_flag(finished, capsys, width, words, name):
    prompts = finished.folder / "prompts.txt"
    prompts.write_text("the fox\n")
    flags = ["--prompts", str(prompts), "--max_new_tokens", "4", "--save_dir", str(finished.out), "--device", "cpu"]
    eval_model.main([*flags, "--model_mode", "0", *words, *width])
    shown = capsys.readouterr().out
    assert shown.startswith(str(finished.out / name))
    assert ("active per token" in shown) == bool(words)


def test_dry_run_tells_the_active_share(finished, call):
    done = call(train_pretrain.main, finished, "--data_path", finished.text, *DATA, *EXPERTS, "--dry_run")
    assert done.code == 0, done.err
    assert f"parameters: {describe_parameters(load_model(finished.run))}\n" in done.out
    assert "active per token" in done.out


@pytest.mark.parametrize("script, data", [(train_pretrain, "text"), (train_sft, "chat")])
def test_dry_run_measures_the_loss_of_training(finished, call, monkeypatch, script, data):
    seen, loss = [], script.causal_lm_loss

    def spy(model, batch, router_stats=None):
        loss_sum, n_targets = loss(model, batch, router_stats)
        with torch.no_grad():
            seen.append(float(loss_sum) > float(loss(model, batch)[0]))  # the routers' losses are positive
        return loss_sum, n_targets

    monkeypatch.setattr(script, "causal_lm_loss", spy)
    argv = ["--data_path", getattr(finished, data), *DATA, *EXPERTS, "--from_weight", "", "--dry_run"]
    done = call(script.main, finished, *argv)
    assert done.code == 0, done.err
    assert seen == [True] * 4  # two micro-batches, twice


@pytest.mark.parametrize("flags_of", [["--scoring_func", "softmax"], ["--scoring_func", "softmax", "--use_qk_norm"]])
def test_softmax_families(finished, call, flags_of, tmp_path):
    transformers = pytest.importorskip("transformers")
    argv = ["--data_path", finished.text, *DATA, "--max_steps", "2", "--log_interval", "1", "--use_moe", *flags_of]
    argv += ["--save_dir", tmp_path, "--tokenizer_path", finished.out / "tokenizer"]
    done = call(train_pretrain.main, finished, *argv)
    assert done.code == 0, done.err
    ours = load_model(tmp_path / "pretrain_32_moe").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pretrain_32_moe", dtype=torch.float32).eval()
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
