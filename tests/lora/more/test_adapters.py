"""Several adapters of one model: switched, mixed, disabled, deleted."""

import pytest
import torch

from minillm.errors import UserError
from minillm.lora import (
    add_adapter,
    apply_lora,
    delete_adapter,
    disable_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    save_lora,
    set_adapter,
)  # fmt: skip
from minillm.lora.core import adapted_layers
from minillm.lora.more.adapters import adapters_of

# Adapters of other ranks, scales and layers each.
FIRST = {"rank": 3, "alpha": 5, "target_modules": "attention"}
SECOND = {"rank": 6, "alpha": 3, "target_modules": "q_proj,mlp", "use_rslora": True, "rank_pattern": {"up_proj": 2}}


def trained(tools, name, settings):
    """Return the logits of a model with this adapter alone, and what it adds to each weight."""
    model = tools.model()
    apply_lora(model, adapter_name=name, generator=torch.Generator().manual_seed(len(name)), **settings)
    tools.train(model, 3)
    return tools.logits(model), {n: layer.lora.delta(layer).detach() for n, layer in adapted_layers(model).items()}


@pytest.fixture
def both(tools):
    """A model with two trained adapters; "second" is active."""
    model = tools.model()
    for name, settings, add in (("first", FIRST, None), ("second", SECOND, add_adapter)):
        generator = torch.Generator().manual_seed(len(name))
        if add is None:
            apply_lora(model, adapter_name=name, generator=generator, **settings)
        else:
            add(model, name, generator=generator, **settings)
        tools.train(model, 3)
    return model


def test_each_works_as_if_alone(tools, both):
    alone = {name: trained(tools, name, settings)[0] for name, settings in (("first", FIRST), ("second", SECOND))}
    for name in ("second", "first", "second", "first"):
        set_adapter(both, name)
        torch.testing.assert_close(tools.logits(both), alone[name], rtol=0, atol=1e-12)
    assert not torch.allclose(alone["first"], alone["second"])


def test_only_the_active_one_learns_and_nothing_is_lost(tools, both):
    set_adapter(both, "first")
    parameters = {id(p) for p in lora_parameters(both)}
    assert parameters == {id(p) for n, p in both.named_parameters() if ".lora." in n and "self_attn" in n}
    before = tools.logits(both)
    tools.train(both, 2, first=9)
    learnt = tools.logits(both)
    assert not torch.equal(learnt, before)
    set_adapter(both, "second")
    torch.testing.assert_close(tools.logits(both), trained(tools, "second", SECOND)[0], rtol=0, atol=1e-12)
    set_adapter(both, "first")
    assert torch.equal(tools.logits(both), learnt)


def test_a_switch_keeps_the_tensors(both):
    """What is compiled, captured or wrapped goes on with the same memory."""
    set_adapter(both, "first")
    places = [p.data_ptr() for p in both.parameters()]
    set_adapter(both, "second")
    assert [p.data_ptr() for p in both.parameters()] == places


def test_weighted_combination_adds_the_products(tools, both):
    weights = {"first": 0.7, "second": -0.4}
    deltas = {name: trained(tools, name, s)[1] for name, s in (("first", FIRST), ("second", SECOND))}
    set_adapter(both, weights)
    assert not list(lora_parameters(both))
    reference = tools.model()
    with torch.no_grad():
        for name, factor in weights.items():
            for layer, delta in deltas[name].items():
                reference.get_submodule(layer).weight += factor * delta
    torch.testing.assert_close(tools.logits(both), tools.logits(reference), rtol=0, atol=1e-12)
    set_adapter(both, "first")
    torch.testing.assert_close(tools.logits(both), trained(tools, "first", FIRST)[0], rtol=0, atol=1e-12)
    set_adapter(both, {"second": 0.5})  # one alone, weighted
    merged = merge_lora(both, keep_base=False)
    reference = tools.model()
    with torch.no_grad():
        for layer, delta in deltas["second"].items():
            reference.get_submodule(layer).weight += 0.5 * delta
    torch.testing.assert_close(tools.logits(merged), tools.logits(reference), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [
    {}, {"use_dora": True}, {"init": "pissa"}, {"init": "olora"}, {"bias": "all"},
    {"modules_to_save": ("lm_head",)}, {"modules_to_save": ("embed_tokens", "norm")},
    {"target_modules": "embed_tokens"},
])  # fmt: skip
def test_disabled_the_model_is_the_base_bit_for_bit(tools, settings):
    model = tools.model()
    base = tools.logits(model)
    apply_lora(model, rank=3, **settings)
    tools.train(model, 3)
    learnt = tools.logits(model)
    with disable_lora(model) as same:
        assert same is model
        off = tools.logits(model)
    # What PiSSA and OLoRA subtracted from the weight is added again as a product.
    assert torch.equal(off, base) or ("init" in settings and torch.allclose(off, base, rtol=0, atol=1e-12))
    assert torch.equal(tools.logits(model), learnt)
    with pytest.raises(RuntimeError, match="inside"), disable_lora(model):
        raise RuntimeError("inside")
    assert torch.equal(tools.logits(model), learnt)
    assert tools.train(model, 1, first=5)  # and goes on learning


def test_a_loss_with_the_adapter_off_inside_one_with_it_on(tools):
    """As DPO does with one model in memory: the reference costs no second model and gets no gradient."""
    model = tools.model()
    apply_lora(model, rank=3)
    tools.train(model, 2)
    model.zero_grad()
    batch = tools.batch(seed=3)
    with torch.no_grad(), disable_lora(model):
        reference = tools.loss(model, batch)
    (tools.loss(model, batch) - reference).backward()
    found = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad()
    tools.loss(model, batch).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, lora_parameters(model), strict=True))
    torch.testing.assert_close(reference, tools.loss(tools.model(), batch).detach(), rtol=0, atol=1e-12)


def test_an_adapter_is_deleted(tools, both):
    delete_adapter(both, "first")
    assert list(adapters_of(both).stored) == ["second"]
    with pytest.raises(UserError, match="no adapter 'first': there are second"):
        set_adapter(both, "first")
    with pytest.raises(UserError, match="'second' is active"):
        delete_adapter(both, "second")
    with pytest.raises(UserError, match="no adapter 'third'"):
        delete_adapter(both, "third")


@pytest.mark.parametrize(
    "first, second, words",
    [
        ({"init": "pissa"}, {}, "'default' subtracts its start from the model's weights"),
        ({}, {"init": "olora"}, "'more' subtracts its start"),
        ({"use_dora": True}, {}, "'default' and 'more' are not both DoRA"),
    ],
)
def test_adapters_that_cannot_live_together(tools, first, second, words):
    model = tools.model()
    apply_lora(model, **first)
    with pytest.raises(UserError, match=words):
        add_adapter(model, "more", **second)
    assert list(adapters_of(model).stored) == ["default"]


def test_mixtures_that_make_no_sense(tools):
    model = tools.model()
    apply_lora(model, rank=3, use_dora=True)
    add_adapter(model, "more", rank=3, use_dora=True)
    with pytest.raises(UserError, match="'default' is DoRA, whose row lengths do not add up"):
        set_adapter(model, {"default": 0.5, "more": 0.5})
    model = tools.model()
    apply_lora(model, rank=3, modules_to_save=("lm_head",))
    add_adapter(model, "more", rank=3)
    with pytest.raises(UserError, match="'default' trains whole layers"):
        set_adapter(model, {"default": 0.5, "more": 0.5})
    with pytest.raises(UserError, match="no adapter 'nothing': there are default, more"):
        set_adapter(model, "nothing")
    with pytest.raises(UserError):
        set_adapter(model, {})
    merge_lora(model)
    for refused in (lambda: set_adapter(model, "default"), lambda: disable_lora(model).__enter__()):
        with pytest.raises(UserError, match="merged into the weights: unmerge_lora first"):
            refused()


@pytest.mark.parametrize("settings, words", [
    ({"modules_to_save": ("nothing",)}, "no layer is called nothing"),
    ({"use_dora": True, "target_modules": "embed_tokens,q_proj"}, "are not both DoRA"),
    ({"rank": 25, "init": "orthogonal"}, "rank 25"),
])  # fmt: skip
def test_what_cannot_be_added_changes_nothing(tools, settings, words):
    model = tools.model()
    apply_lora(model, rank=3)
    tools.train(model, 2)
    logits, names = tools.logits(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=words):
        add_adapter(model, "more", **settings)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(adapters_of(model).stored) == ["default"]
    assert torch.equal(tools.logits(model), logits)


def test_nothing_is_added_to_merged_weights_and_nothing_saved_while_it_is_off(tools, tmp_path):
    """The one would take its start from other weights, the other would save the base's layers as the adapter's."""
    model = tools.model()
    apply_lora(model, rank=3, modules_to_save=("lm_head",))
    tools.train(model, 2)
    save_lora(model, tmp_path / "good")
    with disable_lora(model), pytest.raises(UserError, match=r"disabled \(disable_lora\): leave that block first"):
        save_lora(model, tmp_path / "off")
    merge_lora(model)
    logits = tools.logits(model)
    for refused in (lambda: add_adapter(model, "more"), lambda: load_lora(model, tmp_path / "good", adapter_name="b")):
        with pytest.raises(UserError, match="merged into the weights: unmerge_lora first"):
            refused()
    assert torch.equal(tools.logits(model), logits)


def test_whole_layers_go_with_their_adapter(tools):
    model = tools.model()
    base = tools.logits(model)
    apply_lora(model, rank=3, modules_to_save=("lm_head",), bias="all")
    tools.train(model, 3)
    first = tools.logits(model)
    add_adapter(model, "more", rank=3)
    torch.testing.assert_close(tools.logits(model), base, rtol=0, atol=1e-12)  # lm_head and biases are the base's again
    assert not model.lm_head.weight.requires_grad
    tools.train(model, 3)
    second = tools.logits(model)
    set_adapter(model, "default")
    assert torch.equal(tools.logits(model), first)
    assert model.lm_head.weight.requires_grad
    set_adapter(model, "more")
    assert torch.equal(tools.logits(model), second)
