"""What --from_weight and --tokenizer_path can mean, and what is said when they mean nothing."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from minillm.cli.arguments import PretrainArguments
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.hub.weights import (
    create_model,
    find_tokenizer,
    find_weights,
    preset_config,
    run_name,
    scale_positions,
)
from minillm.model import Transformer
from minillm.tokenizer import load_tokenizer, train_bpe

SHAPE = {"preset": "demo", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


def arguments(out, **more):
    return PretrainArguments(data_path="-", save_dir=str(out), **(SHAPE | more))


@pytest.fixture(scope="module")
def out(tmp_path_factory, tokenizer):
    """A save_dir with one model, of seed 7, and folders that hold none."""
    out = tmp_path_factory.mktemp("out")
    tokenizer.save(out / "tokenizer")
    save_model(create_model(arguments(out, seed=7), tokenizer), out / "pretrain_32", tokenizer=tokenizer)
    (out / "full_sft_32").mkdir()  # begun, and without a model yet
    return out


def test_a_stage_a_directory_and_a_pth(out, tmp_path):
    stage = out / "pretrain_32"
    assert find_weights("pretrain", save_dir=str(out), hidden_size=32) == stage
    assert find_weights(str(stage), save_dir="elsewhere", hidden_size=999) == stage
    pth = tmp_path / "model.pth"
    pth.write_bytes(b"")
    assert find_weights(str(pth), save_dir=str(out), hidden_size=32) == pth


def test_models_with_experts_lie_beside_dense_ones(out, tmp_path, tokenizer):
    args = arguments(tmp_path, use_moe=True, moe_intermediate_size=8)
    model = create_model(args, tokenizer)
    save_model(model, tmp_path / "pretrain_32_moe", tokenizer=tokenizer)
    stage = tmp_path / "pretrain_32_moe"
    assert run_name("pretrain", hidden_size=32, has_experts=True) == stage.name
    assert find_weights("pretrain", save_dir=str(tmp_path), hidden_size=32, has_experts=True) == stage
    with pytest.raises(UserError, match="there are: pretrain_32_moe"):
        find_weights("pretrain", save_dir=str(tmp_path), hidden_size=32)
    with pytest.raises(UserError, match=r"pretrain_32_moe holds a model; .* there are: pretrain_32 "):
        find_weights("pretrain", save_dir=str(out), hidden_size=32, has_experts=True)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.e_score_correction_bias += torch.tensor([0.25, -0.5, 0.0, 1.0])
    save_model(model, stage, tokenizer=tokenizer)
    again = arguments(tmp_path, use_moe=True, from_weight="pretrain", seed=9)
    assert find_tokenizer(again) == str(stage)
    ours = create_model(again, tokenizer).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    assert model.state_dict().keys() == ours.keys()


@pytest.mark.parametrize("name", ["rlhf", "full_sft", "no/such/place", "notes.txt"])
def test_what_is_not_there_is_answered_by_what_is(out, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(UserError, match=re.escape(f"no weights '{name}'")) as error:
        find_weights(name, save_dir=str(out), hidden_size=32)
    assert str(out / f"{name}_32") in str(error.value)
    assert "there are: pretrain_32 (" in str(error.value)  # not full_sft_32, which holds no model


def test_an_empty_save_dir_says_none(tmp_path):
    with pytest.raises(UserError, match="there are: none"):
        find_weights("pretrain", save_dir=str(tmp_path), hidden_size=64)


def test_where_the_tokenizer_comes_from(out, tmp_path):
    assert find_tokenizer(arguments(out, tokenizer_path="given", from_weight="pretrain")) == "given"
    assert find_tokenizer(arguments(out, from_weight="pretrain")) == str(out / "pretrain_32")
    assert find_tokenizer(arguments(out)) == str(out / "tokenizer")
    assert find_tokenizer(arguments(out), teacher=out / "pretrain_32") == str(out / "pretrain_32")
    given = arguments(out, tokenizer_path="given")
    assert find_tokenizer(given, teacher=out / "pretrain_32") == "given"
    bare = tmp_path / "bare.pth"
    torch.save({}, bare)
    assert find_tokenizer(arguments(out, from_weight=str(bare))) == str(out / "tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(arguments(out, from_weight=str(bare))) == str(tmp_path)


def test_a_new_model_has_the_flags_shape_and_the_seeds_weights(tmp_path, tokenizer):
    one, same, other = (create_model(arguments(tmp_path, seed=seed), tokenizer) for seed in (1, 1, 2))
    config = one.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 1, 4)
    assert config.vocab_size == tokenizer.vocab_size == 267  # not the preset's 1,024
    assert config.bos_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert all(p.dtype is torch.float32 and p.device.type == "cpu" for p in one.parameters())
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert preset_config(arguments(tmp_path)).vocab_size == 1024


def test_weights_come_from_a_directory_or_a_pth(out, tmp_path, tokenizer):
    source = create_model(arguments(out, seed=7), tokenizer).state_dict()
    torch.save(source, tmp_path / "model.pth")
    for name in ("pretrain", str(out / "pretrain_32"), str(tmp_path / "model.pth")):
        model = create_model(arguments(out, from_weight=name, seed=8), tokenizer)
        assert all(torch.equal(tensor, source[key]) for key, tensor in model.state_dict().items()), name
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_flags_that_contradict_the_weights_are_refused(out, tokenizer):
    with pytest.raises(UserError, match=r"--num_hidden_layers 3: the weights .* have num_hidden_layers 1; leave"):
        create_model(arguments(out, from_weight="pretrain", num_hidden_layers=3), tokenizer)
    model = create_model(arguments(out, from_weight="pretrain", num_hidden_layers=1), tokenizer)
    assert model.config.num_hidden_layers == 1


def test_without_runs_of_ones_own_the_demos_serve(out, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for width in (64, 128):
        torch.manual_seed(width)
        config = ModelConfig.preset("demo", vocab_size=tokenizer.vocab_size, hidden_size=width, num_hidden_layers=1)
        save_model(Transformer(config), tmp_path / "out" / "demo" / f"full_sft_{width}", tokenizer=tokenizer)
    model = create_model(arguments(Path("out"), from_weight="full_sft", hidden_size=None), tokenizer)
    assert model.origin == "out/demo/full_sft_128"
    assert "no full_sft weights in out/: using the demo's, out/demo/full_sft_128" in capsys.readouterr().out


def test_a_pth_of_another_shape_is_refused(tmp_path, tokenizer):
    torch.save(create_model(arguments(tmp_path), tokenizer).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match="contradict what was given"):
        create_model(arguments(tmp_path, from_weight=str(tmp_path / "m.pth"), num_hidden_layers=2), tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused(out, tmp_path):
    train_bpe((f"word{n} and word{n}" for n in range(99)), vocab_size=270).save(tmp_path)
    larger = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"270 tokens.*pretrain_32.*267; give --tokenizer_path the tokenizer of these"):
        create_model(arguments(out, from_weight="pretrain"), larger)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    """Every id would mean another text, and nothing else would tell."""
    one, other = (train_bpe(iter([f"{word} " * 9]), vocab_size=269) for word in ("house", "river"))
    assert one.vocab_size == other.vocab_size
    weights = tmp_path / "weights"
    save_model(create_model(arguments(tmp_path), one), weights, tokenizer=one)
    create_model(arguments(tmp_path, from_weight=str(weights)), one)
    with pytest.raises(UserError, match="differs from the one next to"):
        create_model(arguments(tmp_path, from_weight=str(weights)), other)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}  # the demo preset's positions


def test_rope_scaling_of_a_new_model_and_of_weights_is_saved(out, tmp_path, tokenizer):
    for name, more in (("new", {}), ("old", {"from_weight": str(out / "pretrain_32")})):
        args = arguments(out, rope_scaling="yarn:4", max_seq_len=8192, **more)
        model = create_model(args, tokenizer)
        assert (model.config.rope_scaling, model.config.max_position_embeddings) == (YARN, 8192)
        save_model(model, tmp_path / name, tokenizer=tokenizer)
        again = load_model(tmp_path / name)
        assert again.config == model.config
        ids = torch.arange(9)[None]
        assert torch.equal(again(ids), model(ids))
        plain = create_model(arguments(out, **more), tokenizer)
        plain.load_state_dict(model.state_dict())
        assert not torch.equal(again(ids), plain(ids))
        kept = create_model(arguments(out, from_weight=str(tmp_path / name)), tokenizer)
        assert kept.config == model.config  # without the flag the weights' own stays
        taken_off = create_model(arguments(out, from_weight=str(tmp_path / name), rope_scaling="none"), tokenizer)
        assert taken_off.config == plain.config


def test_a_saved_dynamic_model_means_the_same_to_transformers(tmp_path, tokenizer):
    """Its original length is max_position_embeddings over there, and no other key counts."""
    transformers = pytest.importorskip("transformers")
    flags = {"rope_scaling": "dynamic:3", "rope_original_len": 16, "max_seq_len": 48}
    model = create_model(arguments(tmp_path, **flags), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)  # fresh weights barely attend to anything
    assert model.config.max_position_embeddings == 48
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    assert load_model(tmp_path / "model").config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert theirs.config.max_position_embeddings == 16
    for length in (9, 16, 17, 48):
        ids = torch.arange(length)[None] * 7 % 267
        with torch.no_grad():
            wanted = theirs(ids).logits
        assert (model(ids) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def scaled(config, said, original=0):
    return scale_positions(config, PretrainArguments(data_path="-", rope_scaling=said, rope_original_len=original))


@pytest.mark.parametrize("said", ["yarn:4", "dynamic:3", "linear:2.5", "none", ""])
def test_scaling_is_replaced_and_not_multiplied(said):
    config = ModelConfig.preset("demo")
    once = scaled(config, said)
    assert scaled(once, said) == once
    for other in ("linear:1.7", "yarn:2", "dynamic:8"):
        assert scaled(scaled(once, other), said or "none") == once
        assert scaled(scaled(once, other), "none") == config
    factor = float(said.partition(":")[2] or 1)
    assert once.max_position_embeddings == 2048 * factor


def test_the_original_length_of_short_rows():
    config = ModelConfig.preset("demo")
    assert scaled(config, "yarn:4", 100).rope_scaling["original_max_position_embeddings"] == 100
    assert scaled(config, "yarn:4", 100).max_position_embeddings == 400
    assert scaled(config, "linear:1.5", 101).max_position_embeddings == 151
    assert scaled(scaled(config, "linear:1.5", 101), "none").max_position_embeddings == 101
    with pytest.raises(UserError, match="--rope_original_len 2049: the model has 2048 positions"):
        scaled(scaled(config, "yarn:4"), "yarn:4", 2049)


@pytest.mark.parametrize("said, limit", [("", 2048), ("none", 2048), ("linear:2", 4096), ("dynamic:2", 4096)])
def test_rows_longer_than_the_positions_are_refused(out, tokenizer, said, limit):
    for more in ({}, {"from_weight": "pretrain"}):
        create_model(arguments(out, max_seq_len=limit, rope_scaling=said, **more), tokenizer)
        with pytest.raises(UserError, match=f"--max_seq_len {limit + 1}: the model has {limit} positions"):
            create_model(arguments(out, max_seq_len=limit + 1, rope_scaling=said, **more), tokenizer)


def test_a_bare_pth_tells_its_shape(tmp_path, tokenizer):
    """No flag for what the tensors tell; the preset's heads count where its width is that of the weights."""
    one = create_model(arguments(tmp_path, num_key_value_heads=2, intermediate_size=40), tokenizer)
    torch.save({name: tensor.half() for name, tensor in one.state_dict().items()}, tmp_path / "32.pth")
    read = PretrainArguments(data_path="-", from_weight=str(tmp_path / "32.pth"), num_attention_heads=4)
    model = create_model(read, tokenizer)
    assert model.config == dataclasses.replace(one.config, max_position_embeddings=32768)
    assert torch.equal(model.lm_head.weight, one.lm_head.weight.half().float())
    with pytest.raises(UserError, match="--num_attention_heads 8 for MiniMind"):
        create_model(PretrainArguments(data_path="-", from_weight=str(tmp_path / "32.pth")), tokenizer)
    with pytest.raises(UserError, match="num_hidden_layers is 1 in the file, but 3 was given"):
        create_model(dataclasses.replace(read, num_hidden_layers=3), tokenizer)
    with pytest.raises(UserError, match="use_qk_norm is False in the file, but True was given"):
        create_model(dataclasses.replace(read, use_qk_norm=True), tokenizer)

    wide = create_model(PretrainArguments(data_path="-", num_hidden_layers=1), tokenizer)
    torch.save(wide.state_dict(), tmp_path / "512.pth")
    read = PretrainArguments(data_path="-", from_weight=str(tmp_path / "512.pth"))
    assert create_model(read, tokenizer).config == wide.config


def test_a_configuration_beside_a_pth_is_believed(tmp_path, tokenizer):
    one = create_model(arguments(tmp_path), tokenizer)
    save_model(one, tmp_path / "run")
    torch.save(one.state_dict(), tmp_path / "run" / "w.pth")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 777.0
    (tmp_path / "run" / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0}))
    read = PretrainArguments(data_path="-", from_weight=str(tmp_path / "run" / "w.pth"))
    assert create_model(read, tokenizer).config == dataclasses.replace(one.config, rope_theta=777.0)
