"""The model that a path or the flags of a program open."""

import shutil
from dataclasses import replace

import pytest
import torch

from minillm.cli.eval_arguments import EvalArguments
from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.evaluation.sample_answers import SampleArguments
from minillm.hub import load_model, open_model, save_model
from minillm.hub.adapters import find_adapters
from minillm.hub.open import open_from_arguments
from minillm.lora import apply_lora, save_lora
from minillm.model import Transformer
from minillm.tokenizer import train_bpe


def tiny_model(seed, width=32):
    torch.manual_seed(seed)
    shape = {"vocab_size": 267, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64}
    return Transformer(ModelConfig(hidden_size=width, **shape, initializer_range=0.3))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A save_dir with one fine-tuned model, two reasoning ones, and an adapter."""
    folder, tokenizer = tmp_path_factory.mktemp("out"), train_bpe(iter(["a"]), vocab_size=267)
    tokenizer.save(folder / "tokenizer")
    for seed, (stage, width) in enumerate([("full_sft", 32), ("reason", 32), ("reason", 64)]):
        save_model(tiny_model(seed, width), folder / f"{stage}_{width}", tokenizer=tokenizer)
    adapted = tiny_model(0)
    apply_lora(adapted, rank=2)
    for module in adapted.modules():
        if hasattr(module, "lora"):
            torch.nn.init.normal_(module.lora.B.weight, std=0.3)
    save_lora(adapted, folder / "lora" / "cooking_32")
    return folder


@pytest.fixture
def arguments(out):
    """Return the arguments of eval_model.py for this save_dir."""
    return lambda **more: EvalArguments(save_dir=str(out), device="cpu", **more)


def test_the_stage_of_the_mode_at_the_only_width_there_is(arguments, out, capsys):
    model, tokenizer, path = open_from_arguments(arguments())
    assert path == out / "full_sft_32"
    assert not model.training
    assert tokenizer.vocab_size == 267
    assert torch.equal(model.model.embed_tokens.weight, tiny_model(0).model.embed_tokens.weight)
    assert capsys.readouterr().out.startswith(f"{path}: parameters ")


def test_of_several_widths_one_must_be_named(arguments, out):
    assert open_from_arguments(arguments(model_mode=3, hidden_size=64))[2] == out / "reason_64"
    with pytest.raises(UserError, match="reason_512"):  # the preset's own width
        open_from_arguments(arguments(model_mode=3))


def test_any_arguments_with_these_fields(arguments, out):
    given = {"data_path": "x", "output": "y", "save_dir": str(out), "device": "cpu", "hidden_size": 32}
    assert open_from_arguments(SampleArguments(**given))[2] == out / "reason_32"
    assert open_from_arguments(arguments(from_weight="reason", hidden_size=32))[2] == out / "reason_32"
    assert open_from_arguments(arguments(from_weight=str(out / "reason_64")))[2] == out / "reason_64"


def test_adapters_dtype_and_positions(arguments):
    plain, _, _ = open_from_arguments(arguments())
    adapted, _, _ = open_from_arguments(arguments(lora_name="cooking"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.allclose(adapted(ids), plain(ids))
    for name in ("", "cooking"):
        model, _, _ = open_from_arguments(arguments(dtype="bfloat16", lora_name=name))
        assert next(model.parameters()).dtype == torch.bfloat16
    assert open_from_arguments(arguments(rope_scaling="yarn:4"))[0].config.max_position_embeddings == 256


def test_the_tokenizer_beside_the_weights_else_that_of_the_directory(arguments, out, tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        open_from_arguments(arguments(tokenizer_path=str(tmp_path)))
    shutil.copytree(out / "full_sft_32", tmp_path / "full_sft_32")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "full_sft_32" / file).unlink()
    there = replace(arguments(), save_dir=str(tmp_path))
    with pytest.raises(UserError, match="tokenizer"):
        open_from_arguments(there)
    shutil.copytree(out / "tokenizer", tmp_path / "tokenizer")
    assert open_from_arguments(there)[1].content_hash == open_from_arguments(arguments())[1].content_hash


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(arguments, tmp_path):
    train_bpe(iter(["the cat sat on the mat"] * 9), vocab_size=275).save(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        open_from_arguments(arguments(tokenizer_path=str(tmp_path)))


def test_missing_weights_are_an_error_that_lists_what_there_is(arguments):
    with pytest.raises(UserError, match=r"no weights 'rlhf'.*full_sft_32, reason_32, reason_64"):
        open_from_arguments(arguments(model_mode=2))


@pytest.mark.parametrize("name", ["/no/such/model", "[x", "a/../b*"])
def test_names_are_not_patterns(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no weights"):
        open_from_arguments(EvalArguments(from_weight=name, device="cpu"))


def test_without_a_directory_the_demo_serves(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"in out/ or out/demo/: run `make demo` .*`python train_pretrain.py`, then"):
        open_from_arguments(EvalArguments(device="cpu"))
    tokenizer = train_bpe(iter(["a"]), vocab_size=267)
    for seed, width in enumerate((64, 128)):  # the smaller one is what the demo's student is compared with
        save_model(tiny_model(seed, width), tmp_path / f"out/demo/pretrain_{width}", tokenizer=tokenizer)
    path = open_from_arguments(EvalArguments(device="cpu", model_mode=0))[2]
    assert str(path) == "out/demo/pretrain_128"
    assert "no pretrain weights in out/: using the demo's" in capsys.readouterr().out
    for more in ({"from_weight": "pretrain_64"}, {"model_mode": 0, "hidden_size": 64}):
        assert str(open_from_arguments(EvalArguments(device="cpu", **more))[2]) == "out/demo/pretrain_64"
    shutil.copytree(out / "full_sft_32", tmp_path / "out/pretrain_32")
    assert str(open_from_arguments(EvalArguments(device="cpu", model_mode=0))[2]) == "out/pretrain_32"


def test_an_adapter_is_opened_on_the_model_it_was_made_for(out, arguments):
    """The flags name no weights, and the usual ones are others."""
    torch.manual_seed(5)
    base = load_model(out / "reason_32")
    base.origin = str(out / "reason_32")
    apply_lora(base, rank=2)
    save_lora(base, out / "lora" / "thinking_32")
    assert open_from_arguments(arguments(lora_name="thinking"))[2] == out / "reason_32"
    assert open_from_arguments(arguments(lora_name="cooking"))[2] == out / "full_sft_32"


def test_an_adapter_beside_the_model_is_found_unless_the_directory_has_one(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def weight(lora_name):
        args = EvalArguments(from_weight=str(out / "full_sft_32"), lora_name=lora_name, device="cpu")
        return open_from_arguments(args)[0].model.layers[0].self_attn.q_proj.weight

    beside = weight("cooking")
    assert not torch.equal(beside, weight(""))
    assert not torch.equal(beside, weight("cooking:0.5"))
    other = tiny_model(0)
    apply_lora(other, rank=2)  # which changes nothing
    save_lora(other, "out/lora/cooking_32")
    assert torch.equal(weight("cooking"), weight(""))
    with pytest.raises(UserError, match="no adapter 'baking'"):
        weight("baking")


@pytest.mark.parametrize("name", ["full_sft", "full_sft_32", "{out}/full_sft_32", "{out}/weights/model.pth"])
def test_a_path_opens_what_the_flags_open(out, arguments, name):
    wanted, wanted_tokenizer, _ = open_from_arguments(arguments())
    if not (out / "weights").exists():
        shutil.copytree(out / "full_sft_32", out / "weights", ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(wanted.state_dict(), out / "weights" / "model.pth")
    model, tokenizer = open_model(name.format(out=out), device="cpu", save_dir=str(out))
    assert not model.training
    assert tokenizer.content_hash == wanted_tokenizer.content_hash
    for parameter, wanted_parameter in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(parameter, wanted_parameter)


def test_a_path_takes_adapters_by_name_and_a_dtype(out, arguments):
    ids = torch.tensor([[1, 2, 3]])
    options = {"device": "cpu", "save_dir": str(out)}
    adapted, _ = open_model("full_sft", lora_name="cooking:0.5", **options)
    with torch.no_grad():
        assert torch.equal(adapted(ids), open_from_arguments(arguments(lora_name="cooking:0.5"))[0](ids))
    assert next(open_model("full_sft", dtype="bfloat16", **options)[0].parameters()).dtype == torch.bfloat16


def test_adapters_are_looked_up_once(out, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "minillm.hub.open.find_adapters",
        lambda *args, **options: calls.append(args[1]) or find_adapters(*args, **options),
    )
    open_model("full_sft", lora_name="cooking", device="cpu", save_dir=str(out))
    assert calls == ["cooking"]


def test_a_path_that_opens_nothing(out, tmp_path):
    options = {"device": "cpu", "save_dir": str(out)}
    with pytest.raises(UserError, match=r"path .*cooking_32: .* is an adapter, not a model"):
        open_model(out / "lora" / "cooking_32", **options)
    with pytest.raises(UserError, match=r"no adapter 'swimming'.*cooking_32"):
        open_model("full_sft", lora_name="swimming", **options)
    torch.save(tiny_model(0).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"no model configuration: .*config\.json does not exist"):
        open_model(tmp_path / "bare.pth", tokenizer_path=str(out / "tokenizer"), **options)
