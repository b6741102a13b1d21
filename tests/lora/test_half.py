"""Adapters of models in half precision: what is learnt in float32 must reach the output, and equal the merge."""

import pytest
import torch
from torch import nn

from minillm.kernels.low_rank_linear import low_rank_linear
from minillm.lora import apply_lora
from minillm.lora.layer import LoRA, adapted_layers, bind
from tests.foreign.models import make_model

HALF = [torch.bfloat16, torch.float16]


def foreign(tmp_path, dtype, family="qwen2", **settings):
    """A transformers model of half precision with an adapter whose B is drawn too."""
    import transformers

    make_model(family, "qwen2", tmp_path, dtype=dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    apply_lora(model, rank=3, generator=torch.Generator().manual_seed(0), **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora.B.weight.normal_(std=0.1, generator=generator)
    return model


def inputs(layer, dtype, n_rows=1024):
    return torch.randn(n_rows, layer.weight.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)


def gain(after, before):
    """Return the factor between two outputs that differ by one, rounding averaged out."""
    after, before = after.double(), before.double()
    return float((after * before).sum() / before.square().sum())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factor", [0.999, 1.001, 1.003])
@torch.no_grad()
def test_small_changes_of_dora_s_magnitudes_reach_the_output(dtype, factor, tmp_path):
    """bfloat16 has steps of 0.4 and 0.8 % around 1."""
    model = foreign(tmp_path, dtype, use_dora=True, target_modules="o_proj,down_proj")  # without biases
    for name, layer in adapted_layers(model).items():
        x = inputs(layer, dtype)
        before = layer(x)
        layer.lora.magnitude.mul_(factor)
        after = layer(x)
        assert before.dtype == after.dtype == dtype
        # y is rounded twice, which moves the mean a little; without the small factor the gain is 1.
        assert gain(after, before) == pytest.approx(factor, abs=4e-4), name


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_the_output_is_that_of_the_merge_in_float32(dtype, use_dora, tmp_path):
    """alpha / rank is 4/3, which bfloat16 rounds by 0.2 %: the adapter's part must not shrink with it."""
    model = foreign(tmp_path, dtype, use_dora=use_dora, alpha=4.0)
    for name, layer in adapted_layers(model).items():
        x = inputs(layer, dtype)
        if use_dora:
            generator = torch.Generator().manual_seed(3)
            layer.lora.magnitude.mul_(1 + 0.02 * torch.rand(len(layer.weight), generator=generator))
        wanted = nn.functional.linear(x.double(), layer.weight.double() + layer.lora.delta(layer).double())
        ours = layer(x).double() - (0 if layer.bias is None else layer.bias.double())
        base = nn.functional.linear(x.double(), layer.weight.double())
        error = float((ours - wanted).norm() / wanted.norm())
        assert error < 2 * torch.finfo(dtype).eps, name  # roundings of the products
        assert gain(ours - base, wanted - base) == pytest.approx(1, abs=1.5e-3), name


@pytest.mark.parametrize("base, product", [(a, b) for a in HALF for b in HALF if a != b])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_base_of_one_half_precision_under_autocast_of_the_other(base, product, use_dora):
    from minillm.config import ModelConfig
    from minillm.model import Transformer

    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(**sizes, num_key_value_heads=2, intermediate_size=40)).to(base)
    apply_lora(model, rank=3, use_dora=use_dora)
    ids = torch.randint(37, (2, 9))
    with torch.autocast("cpu", dtype=product):
        logits = model.train()(ids)
    logits.float().square().sum().backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all()
    assert any(p.grad.any() for name, p in model.named_parameters() if name.endswith("lora.B.weight"))


@torch.no_grad()
def test_row_norms_are_those_of_the_whole_sum_however_the_rows_are_cut(monkeypatch, tmp_path):
    model = foreign(tmp_path, torch.bfloat16, use_dora=True)
    for layer in adapted_layers(model).values():
        lora = layer.lora
        wanted = (layer.weight.double() + (lora.scaling * lora.B.weight @ lora.A.weight).double()).norm(dim=1)
        whole = lora.row_norms(layer.weight)
        monkeypatch.setattr("minillm.lora.layer.NORM_NUMEL", 5 * layer.weight.shape[1])
        for norms in (whole, lora.row_norms(layer.weight)):
            assert norms.dtype == torch.float32
            torch.testing.assert_close(norms.double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dropout", [0.001, 0.998, 0.99805, 0.999, 1 - 1e-9])
def test_any_dropout_below_1_gives_finite_numbers_of_the_right_mean(dropout):
    torch.manual_seed(0)
    weight, a, b = torch.zeros(5, 64), torch.full((2, 64), 0.1), torch.full((5, 2), 0.1)
    x, one = torch.ones(4000, 64), torch.ones(())
    y = low_rank_linear(x.requires_grad_(), weight, None, a, b, one, dropout)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert float(y.detach().mean()) == pytest.approx(64 * 0.1 * 2 * 0.1, rel=0.15)  # 256,000 inputs, 1,000 stay


def test_what_was_taken_out_of_a_weight_moves_with_the_model():
    """As buffers, which engines move that do not call the model's ``to``; no part of a state dict."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    names = set(model.state_dict())
    apply_lora(model, rank=2, init="pissa")
    wanted = [layer.lora.initial for layer in adapted_layers(model).values()]
    buffers = dict(model.named_buffers())
    for (a, b), name in zip(wanted, adapted_layers(model), strict=True):
        assert buffers[f"{name}.lora.initial_a"] is a
        assert buffers[f"{name}.lora.initial_b"] is b
    assert not any("initial" in name for name in set(model.state_dict()) - names)
    model.half()
    for layer, before in zip(adapted_layers(model).values(), wanted, strict=True):
        assert all(torch.equal(now, then) for now, then in zip(layer.lora.initial, before, strict=True))
    layer = nn.Linear(8, 6)
    bind(layer, LoRA(8, 6, rank=2, like=layer.weight))
    assert layer.lora.initial is None
