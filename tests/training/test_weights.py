"""What --from_weight and --tokenizer_path can mean, and what is said when they mean nothing."""

import re

import pytest
import torch

from minillm.errors import UserError
from minillm.model.hf import save_model
from minillm.tokenizer import load_tokenizer, train_bpe
from minillm.training.arguments import PretrainArguments
from minillm.training.weights import create_model, find_tokenizer, find_weights, preset_config

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
    bare = tmp_path / "bare.pth"
    torch.save({}, bare)
    assert find_tokenizer(arguments(out, from_weight=str(bare))) == str(out / "tokenizer")


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


def test_the_stored_shape_wins_over_the_flags(out, tokenizer):
    model = create_model(arguments(out, from_weight="pretrain", num_hidden_layers=3), tokenizer)
    assert model.config.num_hidden_layers == 1


def test_a_pth_of_another_shape_is_refused(tmp_path, tokenizer):
    torch.save(create_model(arguments(tmp_path), tokenizer).state_dict(), tmp_path / "m.pth")
    with pytest.raises(UserError, match="do not fit"):
        create_model(arguments(tmp_path, from_weight=str(tmp_path / "m.pth"), num_hidden_layers=2), tokenizer)


def test_a_tokenizer_larger_than_the_embedding_is_refused(out, tmp_path):
    train_bpe((f"word{n} and word{n}" for n in range(99)), vocab_size=270).save(tmp_path)
    larger = load_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"270 tokens.*pretrain_32.*267.*--tokenizer_path"):
        create_model(arguments(out, from_weight="pretrain"), larger)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    """Every id would mean another text, and nothing else would tell."""
    one, other = (train_bpe(iter([f"{word} " * 9]), vocab_size=269) for word in ("house", "river"))
    assert one.vocab_size == other.vocab_size
    weights = tmp_path / "weights"
    save_model(create_model(arguments(tmp_path), one), weights, tokenizer=one)
    create_model(arguments(tmp_path, from_weight=str(weights)), one)
    with pytest.raises(UserError, match="not the one that lies beside"):
        create_model(arguments(tmp_path, from_weight=str(weights)), other)
