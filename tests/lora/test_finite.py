"""What is not finite is not saved, loaded or merged; the message names the tensor, and nothing is left behind."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.lora import apply_lora, load_lora, merge_lora, save_lora, unmerge_lora
from minillm.lora.__main__ import main
from minillm.lora.layer import adapted_layers

NAME = "model.layers.1.self_attn.q_proj"


def adapted(tools, dtype=torch.float32, size=0.1, **settings):
    model = tools.model(dtype=dtype)
    apply_lora(model, rank=3, generator=torch.Generator().manual_seed(1), **settings)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora.B.weight.normal_(std=size, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["A", "B"])
@pytest.mark.parametrize("form", ["adapter", "adapter.pth"])
def test_a_broken_adapter_is_refused_at_every_door(tools, value, key, form, tmp_path):
    model = adapted(tools)
    save_lora(model, tmp_path / form)
    with torch.no_grad():
        getattr(adapted_layers(model)[NAME].lora, key).weight[1, 1] = value
    weights = {name: p.clone() for name, p in model.named_parameters() if ".lora." not in name}
    with pytest.raises(UserError, match=rf"not finite in {NAME}\.{key}: nothing was written"):
        save_lora(model, tmp_path / "other" / form)
    assert not (tmp_path / "other").exists()
    for keep_base in (True, False):
        with pytest.raises(UserError, match=rf"{NAME}\.weight with the adapter has numbers that are not finite in f"):
            merge_lora(model, keep_base=keep_base)
    assert not any(layer.lora.merged for layer in adapted_layers(model).values())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    if form.endswith(".pth"):
        content = torch.load(tmp_path / form)
        content[f"{NAME}.lora.{key}.weight"][0, 0] = value
        torch.save(content, tmp_path / form)
    else:
        path = tmp_path / form / "adapter_model.safetensors"
        content = load_file(path)
        content[f"base_model.model.{NAME}.lora_{key}.weight"][0, 0] = value
        save_file(content, path)
    with pytest.raises(UserError, match=rf"{form} has numbers that are not finite in {NAME}\.{key}"):
        load_lora(tools.model(dtype=torch.float32), tmp_path / form)


@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"target_modules": "lm_head,q_proj"}])
def test_a_merge_that_overflows_leaves_the_model_as_it_was(tools, settings):
    model = adapted(tools, dtype=torch.float16, **settings)
    wanted = tools.logits(model)
    last = list(adapted_layers(model).values())[-1].lora.B.weight
    with torch.no_grad():
        last.mul_(1e7)
    with pytest.raises(UserError, match=r"\.weight with the adapter .* not finite in float16: nothing was merged"):
        merge_lora(model)
    with torch.no_grad():
        last.div_(1e7)
    torch.testing.assert_close(tools.logits(model), wanted, rtol=2e-3, atol=2e-3)
    unmerge_lora(merge_lora(model))


def test_merging_into_float16_on_the_command_line(tools, tmp_path, capsys):
    save_model(tools.model(dtype=torch.float32), tmp_path / "base")
    save_lora(adapted(tools, size=1e7), tmp_path / "large")
    words = ["merge", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "large"), "--any_base"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path / "merged"), "--dtype", "float16"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "has the number" in message
    assert "float16 ends at 6.55e+04: nothing was written; choose bfloat16 or float32" in message
    assert not (tmp_path / "merged").exists()
    main([*words, "--output", str(tmp_path / "merged"), "--dtype", "bfloat16"])
    assert load_model(tmp_path / "merged").lm_head.weight.isfinite().all()


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tools, tmp_path):
    model = adapted(tools)
    for change in (lambda: None, lambda: merge_lora(model)):
        change()
        with pytest.raises(UserError, match=r"has an adapter.*merge_lora\(model, keep_base=False\).*save_lora"):
            save_model(model, tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
    unmerge_lora(model)
    save_model(merge_lora(model, keep_base=False), tmp_path / "whole")
    assert not any(".lora." in name for name in load_file(tmp_path / "whole" / "model.safetensors"))


@pytest.mark.parametrize("layers, absent", [((0, 7), "7"), ((2,), "2"), ((1, 2, 3), "2, 3")])
def test_blocks_that_are_not_there_are_named(tools, layers, absent):
    with pytest.raises(UserError, match=f"layers {absent}: the model has no such block; its blocks are 0 to 1"):
        apply_lora(tools.model(), layers=layers)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_not_there_are_said(tools, bias):
    with pytest.raises(UserError, match=rf"bias='{bias}' .*: .* bias; leave it out"):
        apply_lora(tools.model(attention_bias=False), bias=bias)
    with pytest.raises(UserError, match=r"bias=.lora_only. .*: no adapted layer has a bias"):
        apply_lora(tools.model(), bias="lora_only", target_modules="mlp")


def test_the_base_is_found_from_anywhere(tools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tools.model(dtype=torch.float32), tmp_path / "base")
    model = load_model("base")
    for origin, wanted in (("base", str(tmp_path / "base")), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")):
        model.origin = origin
        if not hasattr(model, "lora_adapters"):
            apply_lora(model, rank=2)
        save_lora(model, "adapter")
        said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert said["base_model_name_or_path"] == wanted
