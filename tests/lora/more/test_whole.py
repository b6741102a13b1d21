"""Layers and biases that an adapter trains whole, and weights that two layers share."""

import pytest
import torch

from minillm.lora import add_adapter, apply_lora, disable_lora, remove_lora
from minillm.lora.more.whole import named_parameters, untie


def tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight if hasattr(model, "get_input_embeddings") else (
        model.lm_head.weight is model.model.embed_tokens.weight
    )  # fmt: skip


WHOLE = {
    ("lm_head",): ({"lm_head.weight"}, False),
    ("embed_tokens",): ({"model.embed_tokens.weight"}, False),
    ("embed_tokens", "lm_head"): ({"model.embed_tokens.weight", "lm_head.weight"}, True),
    ("norm",): ({"model.norm.weight"}, True),
    ("1.mlp",): ({f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}, True),
}


@pytest.mark.parametrize(
    "which, wanted", [*(("ours", wanted) for wanted in WHOLE), ("qwen3", ("lm_head",)), ("qwen3", ("norm",))]
)
def test_named_layers_are_trained_whole(tools, which, wanted):
    trained, still_tied = WHOLE[wanted]
    model = tools.model() if which == "ours" else tools.hf(which)
    assert tied(model)
    before = {name: p.detach().clone() for name, p in named_parameters(model)}
    apply_lora(model, rank=2, target_modules="q_proj", modules_to_save=wanted)
    assert {name for name, p in named_parameters(model) if p.requires_grad} == trained
    assert tied(model) == still_tied == model.config.tie_word_embeddings
    tools.train(model, 2)
    after = dict(named_parameters(model))
    assert {name for name in before if not torch.equal(after[name], before[name])} == trained
    remove_lora(model)
    assert tied(model)
    assert model.config.tie_word_embeddings
    assert all(torch.equal(p, before[name]) for name, p in named_parameters(model))


@pytest.mark.parametrize(
    "bias, trained",
    [("none", set()), ("all", {"q", "k", "v"}), ("lora_only", {"q", "v"})],
)
def test_biases(tools, bias, trained):
    model = tools.model()
    apply_lora(model, rank=2, target_modules="q_proj,v_proj,up_proj", bias=bias)
    found = {name for name, p in named_parameters(model) if p.requires_grad}
    assert found == {f"model.layers.{i}.self_attn.{letter}_proj.bias" for i in (0, 1) for letter in trained}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_layers_are_trained_wide(tools, dtype):
    """A step of 1e-5 of a weight would be lost in half precision."""
    model = tools.model(dtype=dtype)
    before = model.lm_head.weight.detach().clone()
    apply_lora(model, rank=2, modules_to_save=("lm_head", "embed_tokens"))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # still tied
    assert model.lm_head.weight.dtype == torch.float32
    with torch.no_grad():
        model.lm_head.weight.mul_(1 + 1e-5)
    assert (model.lm_head.weight / before.float()).sub(1).mean().item() == pytest.approx(1e-5, rel=0.1)
    add_adapter(model, "more", rank=2)
    assert torch.equal(model.lm_head.weight, before.float())
    remove_lora(model)
    assert model.lm_head.weight.dtype == dtype
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_trained_head_under_autocast(tools):
    model = tools.model(dtype=torch.bfloat16)
    apply_lora(model, rank=2, modules_to_save=("lm_head",))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tools.loss(model, tools.batch()).float()
    loss.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32
    assert model.lm_head.weight.grad.any()


def test_disabled_biases_and_layers_are_the_old_ones_and_come_back(tools):
    model = tools.model()
    before = {name: p.detach().clone() for name, p in named_parameters(model)}
    apply_lora(model, rank=2, modules_to_save=("lm_head",), bias="all")
    tools.train(model, 2)
    learnt = {name: p.detach().clone() for name, p in named_parameters(model)}
    with disable_lora(model):
        assert all(torch.equal(p, before[name]) for name, p in named_parameters(model))
    assert all(torch.equal(p, learnt[name]) for name, p in named_parameters(model))


def test_untie_gives_a_copy_only_where_it_must(tools):
    model = tools.model()
    apply_lora(model, rank=2)
    untie(model, {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"})
    assert tied(model)
    untie(model, {"lm_head.weight"})
    assert not tied(model)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lora_adapters.untied == {"lm_head.weight": "model.embed_tokens.weight"}
