"""What a run writes of its model, and where; and the adapters that --lora_name finds."""

from types import SimpleNamespace

import pytest
import torch

from minillm.checkpoints.outputs import AdapterAlone, WholeModel
from minillm.errors import UserError
from minillm.hub.adapters import find_adapters
from minillm.hub.huggingface import load_model
from minillm.lora import LoRAConfig, apply_lora, load_lora, save_lora
from minillm.lora.core import adapted_layers
from minillm.lora.more.merge import merge_adapters
from tests.contracts.harness import CONFIG, MOE_CONFIG, tiny_model

IDS = torch.arange(11)[None]


def arguments(**changes):
    usual = {"save_dir": "there", "lora_name": "cooking", "from_weight": "full_sft", "base_dtype": "float32",
             "run_name": "", "loraplus_ratio": 1.0, "lora_config": LoRAConfig()}  # fmt: skip
    return SimpleNamespace(**(usual | changes))


def merge_named(model, lora_name, *, save_dir):
    """Merge adapters as ``open_model`` does; return their paths."""
    adapters = find_adapters(model, lora_name, save_dir=save_dir)
    merge_adapters(model, adapters)
    return [path for path, _ in adapters]


def with_adapter(seed, **settings):
    """Return the tiny model with an adapter that does something."""
    model = tiny_model(double=True)
    apply_lora(model, rank=3, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora.B.weight.normal_(std=0.1, generator=generator)
            layer.lora.A.weight.normal_(std=0.1, generator=generator)
    return model


def test_directories_follow_name_width_and_experts():
    args = arguments()
    assert str(WholeModel().directory(args, "full_sft", CONFIG)) == "there/full_sft_16"
    assert str(WholeModel().directory(args, "full_sft", MOE_CONFIG)) == "there/full_sft_16_moe"
    assert str(WholeModel().directory(arguments(run_name="mine"), "full_sft", CONFIG)) == "there/mine"
    with pytest.raises(UserError, match=r"--run_name mine: an adapter is named by --lora_name"):
        AdapterAlone(args).directory(arguments(run_name="mine"), "lora", CONFIG)
    assert str(AdapterAlone(args).directory(args, "lora", CONFIG)) == "there/lora/cooking_16"
    assert str(AdapterAlone(args).directory(args, "lora", MOE_CONFIG)) == "there/lora/cooking_16_moe"


def test_a_checkpoint_gives_the_weights_back(tmp_path):
    model, other = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    WholeModel().write_checkpoint(model, tmp_path, tokenizer=None)
    WholeModel().read_checkpoint(other, tmp_path)
    assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_an_adapters_checkpoint_gives_it_back_and_is_an_adapter_too(tmp_path, init):
    model = with_adapter(1, init=init)
    AdapterAlone(arguments()).write_checkpoint(model, tmp_path, tokenizer=None)
    other = with_adapter(2, init=init)
    assert not torch.equal(model(IDS), other(IDS))
    AdapterAlone(arguments()).read_checkpoint(other, tmp_path)
    assert torch.equal(model(IDS), other(IDS))
    plain = tiny_model(double=True)
    load_lora(plain, tmp_path)
    assert (plain(IDS) - model(IDS)).abs().max() <= 1e-10 * model(IDS).abs().max()
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_that_goes_on_is_that_of_the_same_settings():
    same = AdapterAlone(arguments()).settings()
    changes = [{"from_weight": "rlhf"}, {"base_dtype": "bfloat16"}, {"loraplus_ratio": 4.0},
               {"lora_config": LoRAConfig(dropout=0.1)}]  # fmt: skip
    assert all(AdapterAlone(arguments(**change)).settings() != same for change in changes)
    assert AdapterAlone(arguments()).settings() == same
    assert WholeModel().settings() == {}


def test_adapters_are_found_by_name_directory_and_pth_and_weighed(tmp_path, monkeypatch):
    first, second = with_adapter(1), with_adapter(2)
    save_lora(first, tmp_path / "lora" / "cooking_16")
    save_lora(second, tmp_path / "second.pth")
    wanted = first(IDS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cooking").write_text("a file of that name, which is none")
    for said in ("cooking", str(tmp_path / "lora" / "cooking_16"), "cooking:1.0"):
        model = tiny_model(double=True)
        assert [path.name for path in merge_named(model, said, save_dir=str(tmp_path))] == ["cooking_16"]
        assert (model(IDS) - wanted).abs().max() <= 1e-10 * wanted.abs().max()
        assert not adapted_layers(model)  # in the weights: as fast as without
    model = tiny_model(double=True)
    merge_named(model, f"cooking:0.7, {tmp_path / 'second.pth'}:0.3", save_dir=str(tmp_path))
    by_hand = tiny_model(double=True)
    with torch.no_grad():
        for name, layer in by_hand.named_modules():
            for part, share in ((first, 0.7), (second, 0.3)):
                if name in adapted_layers(part):
                    layer.weight += share * part.get_submodule(name).lora.delta(part.get_submodule(name))
    assert (model(IDS) - by_hand(IDS)).abs().max() <= 1e-10 * by_hand(IDS).abs().max()


def test_what_is_not_there_is_said(tmp_path):
    save_lora(with_adapter(1), tmp_path / "lora" / "cooking_16")
    with pytest.raises(UserError, match=r"no adapter 'medical'.*lora/ there are: cooking_16"):
        merge_named(tiny_model(), "medical", save_dir=str(tmp_path))
    with pytest.raises(UserError, match="'much' is not a weight"):
        merge_named(tiny_model(), "cooking:much", save_dir=str(tmp_path))
    with pytest.raises(UserError, match="no adapter is named"):
        merge_named(tiny_model(), " , ", save_dir=str(tmp_path))
    with pytest.raises(UserError, match="named twice: name it once, with the sum"):
        merge_named(tiny_model(), f"cooking:0.7,{tmp_path}/lora/cooking_16:0.3", save_dir=str(tmp_path))
    (tmp_path / "weights.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not an adapter"):
        merge_named(tiny_model(), str(tmp_path / "weights.pth"), save_dir=str(tmp_path))


def test_the_whole_model_is_exported_in_the_dtype_asked_for(tmp_path):
    model = tiny_model()
    WholeModel().export(model, tmp_path, tokenizer=None, dtype=torch.bfloat16)
    stored = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(stored.lm_head.weight, model.lm_head.weight.bfloat16().float())
