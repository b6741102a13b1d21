"""Adapters on disk: directories of ours and peft's, flat files, and everything that can be wrong with them."""

import json
import os
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.errors import UserError
from minillm.hub.huggingface import load_model, save_model
from minillm.lora import (
    add_adapter,
    apply_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)  # fmt: skip
from minillm.lora.core import adapted_layers
from minillm.lora.more.adapters import adapters_of
from minillm.lora.more.base import sample_weights

KINDS = {
    "lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"}, "olora": {"init": "olora", "use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"0.self_attn.q_proj": 2.0}, "layers": (0,)},
    "pissa with patterns": {"init": "pissa", "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"q_proj": 2.0}},
    "embedding": {"target_modules": "embed_tokens,q_proj"},
    "whole": {"modules_to_save": ("embed_tokens",), "bias": "all"},
    "whole tied": {"modules_to_save": ("embed_tokens", "lm_head"), "target_modules": "mlp"},
    "own biases": {"bias": "lora_only", "target_modules": "q_proj"},
}  # fmt: skip


def adapted(tools, **settings):
    model = tools.model()
    apply_lora(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(1), **settings)
    tools.train(model, 3)
    return model


@pytest.fixture
def saved(tools, tmp_path):
    """Return (its directory, logits) of a trained adapter."""
    model = adapted(tools)
    save_lora(model, tmp_path / "adapter")
    return tmp_path / "adapter", tools.logits(model)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tools, kind, tmp_path):
    model = adapted(tools, **KINDS[kind])
    wanted = tools.logits(model)
    written = {"adapter": ["adapter_config.json", "adapter_model.safetensors", "base.json"], "flat.pth": ["flat.pth"]}
    for form, names in written.items():
        path = tmp_path / form.removesuffix(".pth") / form
        save_lora(model, path)
        assert torch.equal(tools.logits(model), wanted)  # saving changes nothing
        assert sorted(p.name for p in path.parent.rglob("*") if p.is_file()) == names
        other = tools.model()
        load_lora(other, path)
        torch.testing.assert_close(tools.logits(other), wanted, rtol=0, atol=1e-11)
        assert list(lora_parameters(other))
        tools.train(other, 1)
        merge_lora(other)
    load_lora(other := tools.model(), tmp_path / "adapter" / "adapter")
    save_lora(other, tmp_path / "two")  # the same file again
    one, two = (load_file(tmp_path / p / "adapter_model.safetensors") for p in ("adapter/adapter", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_flat_form(tools, tmp_path):
    save_lora(adapted(tools, target_modules="q_proj", use_dora=True), tmp_path / "x.pth")
    stored = torch.load(tmp_path / "x.pth", weights_only=True)
    assert stored.pop("lora_config")["rank"] == 3
    assert set(stored) == {
        f"model.layers.{i}.self_attn.q_proj.lora.{key}" for i in (0, 1) for key in ("A.weight", "B.weight", "magnitude")
    }


def test_a_flat_file_without_settings_has_scale_one(tools, tmp_path):
    """As MiniMind writes them."""
    drawn = torch.Generator().manual_seed(0)
    flat = {}
    for rank, layer in ((2, "model.layers.0.self_attn.q_proj"), (5, "model.layers.1.self_attn.o_proj")):
        flat[f"{layer}.lora.A.weight"] = torch.randn(rank, 24, generator=drawn)
        flat[f"{layer}.lora.B.weight"] = torch.randn(24, rank, generator=drawn)
    torch.save(flat, tmp_path / "theirs.pth")
    model, reference = tools.model(), tools.model()
    load_lora(model, tmp_path / "theirs.pth")
    with torch.no_grad():
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
            product = flat[f"{name}.lora.B.weight"].double() @ flat[f"{name}.lora.A.weight"].double()
            reference.get_submodule(name).weight += product
    torch.testing.assert_close(tools.logits(model), tools.logits(reference), rtol=0, atol=1e-10)


def test_several_are_saved_one_by_one(tools, tmp_path):
    model = adapted(tools, target_modules="q_proj")
    first = tools.logits(model)
    add_adapter(model, "more", rank=5)
    tools.train(model, 2)
    second = tools.logits(model)
    save_lora(model, tmp_path / "a", adapter_name="default")
    save_lora(model, tmp_path / "b")
    other = tools.model()
    load_lora(other, tmp_path / "b", adapter_name="b")
    load_lora(other, tmp_path / "a", adapter_name="a")
    torch.testing.assert_close(tools.logits(other), first, rtol=0, atol=1e-12)
    set_adapter(other, "b")
    torch.testing.assert_close(tools.logits(other), second, rtol=0, atol=1e-12)
    set_adapter(other, {"a": 0.5, "b": 0.5})
    with pytest.raises(UserError, match="several adapters are active \\(a, b\\): choose one"):
        save_lora(other, tmp_path / "c")
    with pytest.raises(UserError, match="no adapter 'c': there are b, a"):
        save_lora(other, tmp_path / "c", adapter_name="c")
    with pytest.raises(UserError, match="an adapter 'a' already"):
        load_lora(other, tmp_path / "a", adapter_name="a")


def test_tied_layers_that_peft_trained_apart(tools, tmp_path):
    theirs = peft.get_peft_model(
        tools.hf("qwen3"),
        peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    )
    tools.train(theirs, 3)
    theirs.save_pretrained(tmp_path)
    model = tools.hf("qwen3")
    load_lora(model, tmp_path)
    torch.testing.assert_close(tools.logits(model), tools.logits(theirs), rtol=0, atol=1e-10)
    remove_lora(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(tools.logits(model), tools.logits(tools.hf("qwen3")))


def test_a_half_precision_base_is_recognized(tools, saved):
    path, wanted = saved
    model = tools.model(dtype=torch.bfloat16)
    load_lora(model, path)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert float((tools.logits(model).double() - wanted).norm() / wanted.norm()) < 5e-2  # eight bits of mantissa


def test_an_embedding_that_peft_saves_along_must_be_this_models(tools, tmp_path):
    base = tools.hf("llama")
    tools.peft(base, "embedding").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    (name,) = [name for name in stored if "base_layer" in name]
    load_lora(tools.hf("llama"), tmp_path)
    for changed in (stored[name] + 0.1, torch.cat([stored[name], stored[name][:2]])):
        save_file(stored | {name: changed}, file)
        with pytest.raises(UserError, match=r"embed_tokens.weight"):
            load_lora(tools.hf("llama"), tmp_path)


# ---- what is wrong with it ---------------------------------------------------------------------------------------


def rewrite(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))


def change_tensors(path, change):
    file = path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def without(name):
    return lambda path: change_tensors(path, lambda t: {k: v for k, v in t.items() if name not in k})


Q = "model.layers.0.self_attn.q_proj"
WRONG = {
    "nothing there": (shutil.rmtree, r"no adapter at .*: there is no adapter_config.json; give a directory"),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "cut weights": (lambda p: os.truncate(p / "adapter_model.safetensors", 3000), "is damaged, copy it again"),
    "empty weights": (lambda p: os.truncate(p / "adapter_model.safetensors", 0), "is damaged, copy it again"),
    "broken json": (lambda p: (p / "adapter_config.json").write_text("{"), "is damaged, copy it again"),
    "a list": (lambda p: (p / "adapter_config.json").write_text("[]"), "is damaged, copy it again"),
    "a damaged base.json": (lambda p: (p / "base.json").write_text("{}"), "base.json is damaged, copy it again"),
    "a dropout that is none": (lambda p: rewrite(p, lora_dropout=None), "adapter_config.json is damaged"),
    "targets that are none": (lambda p: rewrite(p, target_modules=5), "adapter_config.json is damaged"),
    "another method": (lambda p: rewrite(p, peft_type="IA3"), "peft_type is 'IA3': only LORA"),
    "rank 0": (lambda p: rewrite(p, r=0), "adapter_config.json: rank is 0"),
    "another rank": (lambda p: rewrite(p, r=4), r"down_proj.A has shape \(3, 40\) and the model needs \(4, 40\)"),
    "not supported": (lambda p: rewrite(p, lora_bias=True), "settings that are not supported here: lora_bias=True"),
    "a key is missing": (without("q_proj.lora_B"), rf"{Q}.B is missing; .*1.self_attn.q_proj.B is missing"),
    "all are missing": (without("lora"), "there are no A and B in it"),
    "magnitudes are missing": (lambda p: rewrite(p, use_dora=True), "magnitude is missing; .*; and 11 more"),
    "a layer is missing": (lambda p: rewrite(p, modules_to_save=["lm_head"]), "lacks lm_head.weight"),
    "a layer too many": (
        lambda p: change_tensors(p, lambda t: t | {"base_model.model.model.what.weight": torch.ones(2)}),
        "model.what.weight: the model has no such parameter",
    ),
    "an unknown layer": (
        lambda p: change_tensors(p, lambda t: {k.replace("up_proj", "c_fc"): v for k, v in t.items()}),
        r"model.layers.0.mlp.c_fc: the model has no such layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named_and_the_model_stays(tools, saved, wrong):
    path, _ = saved
    change, words = WRONG[wrong]
    change(path)
    model = tools.model()
    before, parameters = tools.logits(model), [id(p) for p in model.parameters()]
    with pytest.raises(UserError, match=words):
        load_lora(model, path)
    assert not hasattr(model, "lora_adapters")
    assert torch.equal(tools.logits(model), before)
    assert [id(p) for p in model.parameters() if p.requires_grad] == parameters


def test_another_shape_names_both(tools, saved):
    with pytest.raises(
        UserError, match=r"gate_proj.A has shape \(3, 24\) and the model needs \(3, 32\); .*and \d+ more"
    ):
        load_lora(tools.model(hidden_size=32), saved[0])
    with pytest.raises(UserError, match=r"model.layers.1.mlp.down_proj: the model has no such layer"):
        load_lora(tools.model(num_hidden_layers=1), saved[0])


class Code:
    """What unpickling would run."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "content, words",
    [
        ({f"{Q}.lora.A.weight": Code()}, "with code in it, which is not run"),
        ([1, 2], "holds a list, not an adapter"),
        ({f"{Q}.lora.A.weight": 3}, "holds something other than tensors"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 24), "lora_config": "abc"}, "x.pth: its lora_config"),
        ({"model.norm.weight": torch.ones(24)}, "it has no <layer>.lora.A.weight"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 24), "x": 3}, "is not an adapter"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 24)}, f"{Q}.B is missing"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 24), "lora_config": {"r": 2}}, "x.pth: its lora_config .*'r'"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 24), "lora_config": {"rank": 0}}, "x.pth: rank is 0"),
        ({f"{Q}.lora.A.weight": torch.ones(0, 24)}, "x.pth: rank is 0"),
        ({f"{Q}.lora.A.weight": torch.ones(2, 9), f"{Q}.lora.B.weight": torch.ones(24, 2)}, r"has shape \(2, 9\)"),
    ],
)
def test_flat_files_that_are_not_adapters(tools, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        load_lora(tools.model(), tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


def test_flat_files_that_are_cut_or_absent(tools, tmp_path):
    save_lora(adapted(tools), tmp_path / "x.pth")
    os.truncate(tmp_path / "x.pth", 1000)
    with pytest.raises(UserError, match="not an adapter: damaged"):
        load_lora(tools.model(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="there is no such file"):
        load_lora(tools.model(), tmp_path / "y.pth")


def test_a_full_disk_leaves_the_old_adapter(tools, saved, monkeypatch):
    path, wanted = saved
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(tensors, target, **_):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minillm.lora.more.files.save_file", full)
    with pytest.raises(UserError, match=r"cannot write the adapter to .*: No space left on device; choose another"):
        save_lora(adapted(tools, use_dora=True), path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    load_lora(model := tools.model(), path)
    torch.testing.assert_close(tools.logits(model), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["x", "x.pth"])
def test_the_systems_error_is_named(tools, tmp_path, largest_file, name):
    """torch and safetensors wrap it in errors of their own."""
    model = adapted(tools)
    largest_file(1000)
    with pytest.raises(UserError, match=r"cannot write the adapter to .*: File too large; choose another path"):
        save_lora(model, tmp_path / name)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_pefts_own_file_of_a_mixture_is_one_adapter(tools, tmp_path):
    """peft's weighted sum, saved by it, is opened here as what it is."""
    base = tools.hf("qwen2")
    theirs = tools.peft(base, "lora")
    theirs.add_adapter("more", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"]))
    theirs.add_weighted_adapter(["default", "more"], [0.7, 0.3], "sum", combination_type="cat")
    theirs.set_adapter("sum")
    theirs.save_pretrained(tmp_path, selected_adapters=["sum"])
    load_lora(base, tmp_path / "sum")
    torch.testing.assert_close(tools.logits(base), tools.logits(theirs), rtol=0, atol=1e-10)
    assert list(adapters_of(base).stored) == ["default"]


# ---- which model it was made for ---------------------------------------------------------------------------------


def test_another_base_names_both(tools, tmp_path):
    model = tools.model()
    model.origin = "models/one"
    apply_lora(model, rank=3)
    tools.train(model, 2)
    save_lora(model, tmp_path / "adapter")
    other = tools.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.origin = "models/two"
    with pytest.raises(UserError, match=r"was made for models/one, whose weights are not those of models/two"):
        load_lora(other, tmp_path / "adapter")
    assert not hasattr(other, "lora_adapters")
    load_lora(other, tmp_path / "adapter", any_base=True)
    same = tools.model()
    same.origin = "elsewhere/one"  # the weights count, not the path
    load_lora(same, tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").write_text('{"sample": [1%s]}' % ("0" * 400))
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        load_lora(same, tmp_path / "adapter", adapter_name="more")
    (tmp_path / "adapter" / "base.json").unlink()  # as peft writes it: nothing to compare
    load_lora(other, tmp_path / "adapter", adapter_name="again")


def test_a_base_whose_layer_another_adapter_trains_whole_is_recognized(tools, tmp_path):
    model = tools.model()
    apply_lora(model, rank=3, target_modules="lm_head,q_proj")
    tools.train(model, 2)
    save_lora(model, tmp_path / "one")
    wanted = tools.logits(model)
    other = tools.model()
    apply_lora(other, rank=3, target_modules="q_proj", modules_to_save=("lm_head",), adapter_name="whole")
    tools.train(other, 3, lr=0.1)
    load_lora(other, tmp_path / "one")
    torch.testing.assert_close(tools.logits(other), wanted, rtol=0, atol=1e-12)


def test_the_sample_is_of_the_model_whatever_its_adapter_does(tools):
    model = tools.model()
    names = apply_lora(tools.model(), rank=3)
    wanted = sample_weights(model, names)
    assert len(wanted) == 8 * 8
    for settings in ({}, {"init": "pissa"}, {"modules_to_save": ("lm_head",)}):
        model = tools.model()
        apply_lora(model, rank=3, **settings)
        tools.train(model, 2)
        assert sample_weights(model, names) == wanted


def test_the_base_is_found_from_any_working_directory(tools, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tools.model(dtype=torch.float32), tmp_path / "base")
    model = load_model("base")
    apply_lora(model, rank=2)
    for origin, wanted in (("base", str(tmp_path / "base")), ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")):
        model.origin = origin
        save_lora(model, "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == wanted


# ---- numbers that are not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value, key, form", [("nan", "A", "adapter"), ("inf", "B", "adapter.pth")])
def test_a_broken_adapter_is_neither_saved_nor_merged_nor_loaded(tools, value, key, form, tmp_path):
    name, value = "model.layers.1.self_attn.q_proj", float(value)
    model = adapted(tools)
    save_lora(model, tmp_path / form)
    with torch.no_grad():
        getattr(adapted_layers(model)[name].lora, key).weight[1, 1] = value
    weights = {name: p.clone() for name, p in model.named_parameters() if ".lora." not in name}
    with pytest.raises(UserError, match=rf"not finite in {name}\.{key}: nothing was written"):
        save_lora(model, tmp_path / "other" / form)
    assert not (tmp_path / "other").exists()
    for keep_base in (True, False):
        with pytest.raises(UserError, match=rf"{name}\.weight with the adapter has numbers that are not finite in f"):
            merge_lora(model, keep_base=keep_base)
    assert not any(layer.lora.merged for layer in adapted_layers(model).values())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    if form.endswith(".pth"):
        content = torch.load(tmp_path / form)
        content[f"{name}.lora.{key}.weight"][0, 0] = value
        torch.save(content, tmp_path / form)
    else:
        path = tmp_path / form / "adapter_model.safetensors"
        content = load_file(path)
        content[f"base_model.model.{name}.lora_{key}.weight"][0, 0] = value
        save_file(content, path)
    with pytest.raises(UserError, match=rf"{form} has numbers that are not finite in {name}\.{key}"):
        load_lora(tools.model(), tmp_path / form)


def test_a_model_with_an_adapter_is_not_saved_as_one_without(tools, tmp_path):
    model = adapted(tools).float()
    for change in (lambda: None, lambda: merge_lora(model)):
        change()
        with pytest.raises(UserError, match=r"has an adapter.*merge_lora\(model, keep_base=False\).*save_lora"):
            save_model(model, tmp_path / "whole")
        assert not (tmp_path / "whole").exists()
    unmerge_lora(model)
    save_model(merge_lora(model, keep_base=False), tmp_path / "whole")
    assert not any(".lora." in name for name in load_file(tmp_path / "whole" / "model.safetensors"))
