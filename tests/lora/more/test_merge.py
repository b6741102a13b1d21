"""Merged weights give the adapted model's answers; unmerged ones are the old, bit for bit."""

import pytest
import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora import apply_lora, merge_lora, remove_lora, unmerge_lora
from minillm.lora.core import adapted_layers
from minillm.model import Transformer

KINDS = {
    "lora": {}, "dora": {"use_dora": True}, "pissa": {"init": "pissa"}, "olora": {"init": "olora", "use_rslora": True},
    "embedding": {"target_modules": "embed_tokens,q_proj"}, "output": {"target_modules": "lm_head,q_proj"},
    "both tied": {"target_modules": "lm_head,embed_tokens"},
    "whole": {"modules_to_save": ("embed_tokens",), "bias": "all"},
    "whole tied": {"modules_to_save": ("embed_tokens", "lm_head")},
}  # fmt: skip


def adapted(tools, dtype=torch.float64, **settings):
    model = tools.model(dtype=dtype)
    apply_lora(model, rank=3, generator=torch.Generator().manual_seed(1), **settings)
    tools.train(model, 3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(tools, kind):
    model = adapted(tools, **KINDS[kind])
    wanted = tools.logits(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        merge_lora(model)
        torch.testing.assert_close(tools.logits(model), wanted, rtol=0, atol=1e-10)
        unmerge_lora(model)
        assert torch.equal(tools.logits(model), wanted)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    merge_lora(model)
    remove_lora(model)
    assert torch.equal(tools.logits(model), tools.logits(tools.model()))


@pytest.mark.parametrize(
    "kind, dtype",
    [("dora", torch.bfloat16), ("pissa", torch.bfloat16), ("both tied", torch.bfloat16), ("whole", torch.float16)],
)
def test_half_weights_come_back_bit_for_bit(tools, kind, dtype):
    """Subtracting what was added would not give them back: it is lost in the rounding."""
    model = tools.model(dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    apply_lora(model, rank=3, **KINDS[kind])
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for parameter in layer.lora.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    merge_lora(model)
    some = next(iter(adapted_layers(model)))
    assert not torch.equal(model.get_submodule(some).weight, before[f"{some}.weight"])
    unmerge_lora(model)
    remove_lora(model)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == dtype for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_for_good_it_is_an_ordinary_model(tools, kind):
    model = adapted(tools, **KINDS[kind])
    wanted = tools.logits(model)
    assert merge_lora(model, keep_base=False) is model
    torch.testing.assert_close(tools.logits(model), wanted, rtol=0, atol=1e-10)
    assert not hasattr(model, "lora_adapters")
    assert not adapted_layers(model)
    fresh = Transformer(model.config).double()  # tied or not, as the configuration now says
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(tools.logits(fresh), tools.logits(model))
    assert len(list(fresh.parameters())) == len(list(model.parameters()))
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_separate_only_where_one_of_them_changes(tools):
    tied = {}
    for kind in ("lora", "embedding", "output", "both tied", "whole", "whole tied"):
        model = merge_lora(adapted(tools, **KINDS[kind]), keep_base=False)
        tied[kind] = model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings == tied[kind]
    assert tied == {"lora": True, "embedding": False, "output": False, "both tied": False, "whole": False,
                    "whole tied": True}  # fmt: skip


def test_base_weights_are_kept_on_the_cpu(tools):
    model = merge_lora(adapted(tools, torch.float32))
    copies = [layer.lora.base_weight for layer in adapted_layers(model).values()]
    assert {t.device.type for t in copies} == {"cpu"}
    unmerge_lora(model)
    assert {layer.lora.base_weight for layer in adapted_layers(model).values()} == {None}


def test_merged_costs_nothing(tools, monkeypatch):
    model = merge_lora(adapted(tools))
    monkeypatch.setattr("minillm.lora.more.layers.low_rank_linear", None)  # an error where it is called
    tools.logits(model)


def test_merged_for_good_a_half_model_is_one_dtype_again(tools):
    model = tools.model(dtype=torch.bfloat16)
    apply_lora(model, rank=3, modules_to_save=("lm_head",))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    wanted = model.lm_head.weight.detach().clone()
    merge_lora(model, keep_base=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, wanted.bfloat16())
    assert tools.logits(model).isfinite().all()


def test_a_row_of_zeros_stays_one_under_dora():
    layer = nn.Linear(5, 3, bias=False).requires_grad_(False)
    layer.weight[1] = 0
    model = nn.Sequential(layer)
    apply_lora(model, rank=2, use_dora=True)
    y = model(torch.ones(2, 5))
    y.sum().backward()
    assert (y[:, 1] == 0).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert merge_lora(model, keep_base=False)[0].weight.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"init": "pissa"}, {"target_modules": "lm_head,q_proj"}])
def test_a_merge_that_overflows_leaves_the_model_as_it_was(tools, settings):
    model = tools.model(dtype=torch.float16)
    apply_lora(model, rank=3, generator=torch.Generator().manual_seed(1), **settings)
    wanted = tools.logits(model)
    last = list(adapted_layers(model).values())[-1].lora.B.weight
    before = last.detach().clone()
    with torch.no_grad():
        last.add_(1e7)
    with pytest.raises(UserError, match=r"\.weight with the adapter .* not finite in float16: nothing was merged"):
        merge_lora(model)
    with torch.no_grad():
        last.copy_(before)
    torch.testing.assert_close(tools.logits(model), wanted, rtol=2e-3, atol=2e-3)
    unmerge_lora(merge_lora(model))


def test_twice_and_never_are_refused(tools):
    model = adapted(tools)
    with pytest.raises(UserError, match="not merged"):
        unmerge_lora(model)
    merge_lora(model)
    with pytest.raises(UserError, match="merged into the weights: unmerge_lora first"):
        merge_lora(model)
    for refused in (merge_lora, unmerge_lora):
        with pytest.raises(UserError, match="no adapter"):
            refused(tools.model())
