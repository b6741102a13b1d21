"""Variants of the adapted layer: their formulas, and that a model with them can be treated as any other."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.lora import add_adapter, apply_lora, load_lora, merge_lora, remove_lora, save_lora, set_adapter
from minillm.lora.core import adapted_layers, attach
from minillm.lora.more.layers import DoRA, EmbeddingLoRA
from tests.foreign.models import make_model

KINDS = {"lora": {}, "dora": {"use_dora": True}, "embedding": {"target_modules": "embed_tokens,q_proj"},
         "pissa": {"init": "pissa"}, "whole": {"modules_to_save": ("lm_head",), "bias": "all"}}  # fmt: skip
HALF = [torch.bfloat16, torch.float16]


def drawn(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adapted(tools, **settings):
    """Return a model with an adapter whose every part has moved away from its start."""
    model = tools.model()
    apply_lora(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(1), **settings)
    tools.train(model, 3)
    model.zero_grad()
    return model


# ---- formulas ----------------------------------------------------------------------------------------------------


def test_dora_is_its_formula_and_its_row_norms_are_constants():
    layer = nn.Linear(11, 7).double().requires_grad_(False)
    lora = DoRA(11, 7, rank=3, like=layer.weight)
    attach(layer, lora)
    with torch.no_grad():
        for i, parameter in enumerate(lora.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=i))
        lora.scaling.fill_(0.7)
    a, b, m = (p.detach().clone().requires_grad_() for p in (lora.A.weight, lora.B.weight, lora.magnitude))
    x, again = drawn(5, 11, seed=9).requires_grad_(), drawn(5, 11, seed=9).requires_grad_()
    turned = layer.weight + 0.7 * b @ a
    wanted = F.linear(again, (m / turned.norm(dim=1).detach())[:, None] * turned, layer.bias)
    y = layer(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    pairs = ((lora.A.weight, a), (lora.B.weight, b), (lora.magnitude, m), (x, again))
    for ours, reference in pairs:
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-10)


@torch.no_grad()
def test_row_norms_are_those_of_the_whole_sum_however_the_rows_are_split(monkeypatch):
    layer = nn.Linear(24, 17, bias=False).bfloat16()
    lora = DoRA(24, 17, rank=3, like=layer.weight)
    for parameter in lora.parameters():
        nn.init.normal_(parameter)
    wanted = (layer.weight.double() + (lora.scaling * lora.B.weight @ lora.A.weight).double()).norm(dim=1)
    for rows_at_once in (17, 5):
        monkeypatch.setattr("minillm.lora.more.layers.NORM_NUMEL", rows_at_once * 24)
        norms = lora.row_norms(layer.weight)
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms.double(), wanted, rtol=1e-6, atol=0)


def test_embedding_is_its_formula():
    layer = nn.Embedding(9, 6).double().requires_grad_(False)
    lora = EmbeddingLoRA(9, 6, rank=2, like=layer.weight)
    attach(layer, lora)
    lora.initialize()
    ids = torch.tensor([[1, 1, 8], [0, 3, 1]])
    wanted = F.embedding(ids, layer.weight + lora.scaling * (lora.B.weight @ lora.A.weight).T)
    torch.testing.assert_close(layer(ids), wanted, rtol=0, atol=1e-12)
    layer(ids).sum().backward()
    assert lora.A.weight.grad[:, [2, 4, 5, 6, 7]].abs().max() == 0  # ids that do not occur
    assert lora.A.weight.grad[:, [0, 1, 3, 8]].abs().min() > 0


# ---- a model with adapters is a model ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_stored_model_are_independent(tools, kind):
    model = adapted(tools, **KINDS[kind])
    wanted = tools.logits(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    tools.train(model, 2, first=20)
    moved = tools.logits(model)
    assert not torch.equal(moved, wanted)
    assert torch.equal(tools.logits(twin), wanted)  # the policy has moved on, its reference stays
    assert torch.equal(tools.logits(again), wanted)
    assert tools.train(twin, 2, first=20) == tools.train(again, 2, first=20)
    assert torch.equal(tools.logits(model), moved)
    assert torch.equal(tools.logits(merge_lora(twin)), tools.logits(merge_lora(again)))
    remove_lora(twin)
    assert torch.equal(tools.logits(twin), tools.logits(tools.model()))


def test_a_transformers_model_survives_the_same(tools):
    model = tools.hf("qwen3")
    apply_lora(model, rank=3, use_dora=True)
    tools.train(model, 2)
    wanted = tools.logits(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    copies = [copy.deepcopy(model), torch.load(stored, weights_only=False)]
    tools.train(model, 2, first=9)
    assert all(torch.equal(tools.logits(each), wanted) for each in copies)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_narrows_the_model_and_not_the_adapter(tools, kind):
    model = adapted(tools, **KINDS[kind]).float()
    wanted = tools.logits(model)

    def adapter():
        tensors = (*model.named_parameters(), *model.named_buffers())
        return {name: tensor.detach().clone() for name, tensor in tensors if ".lora." in name}

    before = adapter()
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapter().values()} == {torch.float32}
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter().items())  # not rounded on the way
    narrow = tools.logits(model)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wanted).norm() / wanted.norm()) < 2e-2  # eight bits of mantissa, two layers
    model.double()
    assert {tensor.dtype for tensor in adapter().values()} == {torch.float64}


def test_what_was_subtracted_from_a_weight_moves_with_the_model(tools):
    """As buffers, which engines move that do not call the model's ``to``; not part of a state dict."""
    model = tools.model()
    names = set(model.state_dict())
    apply_lora(model, rank=2, init="pissa")
    buffers = dict(model.named_buffers())
    for name, layer in adapted_layers(model).items():
        a, b = layer.lora.initial
        assert buffers[f"{name}.lora.initial_a"] is a
        assert buffers[f"{name}.lora.initial_b"] is b
    assert not any("initial" in name for name in set(model.state_dict()) - names)
    model.to("meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.cuda
def test_moves_to_a_gpu_and_back(tools):
    model = adapted(tools)
    wanted = tools.logits(model)
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        on_gpu = model.cuda().eval()(ids.cuda()).cpu()
    torch.testing.assert_close(on_gpu, wanted, rtol=0, atol=1e-10)
    assert torch.equal(tools.logits(model.cpu()), wanted)


def test_dropout_is_off_in_evaluation_mode(tools):
    model = adapted(tools, dropout=0.5)
    assert torch.equal(tools.logits(model), tools.logits(model))
    batch = tools.batch()
    assert tools.loss(model.train(), batch) != tools.loss(model, batch)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    apply_lora(model, rank=2, dropout=0.3, generator=torch.Generator().manual_seed(0))
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora.B.weight)
    x = drawn(6, 16).requires_grad_()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(4)
        y = checkpoint(model, x, use_reentrant=reentrant, preserve_rng_state=True) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([x.grad.clone()] + [p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
        x.grad = None
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)
        assert one.abs().max() > 0


def test_checkpointing_our_model(tools):
    model = adapted(tools, dropout=0.3)
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        torch.manual_seed(4)
        tools.loss(model, tools.batch()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-12)


# ---- half precision ----------------------------------------------------------------------------------------------


def foreign(tmp_path, dtype, **settings):
    """A transformers model of half precision with an adapter whose B is drawn too."""
    import transformers

    make_model("qwen2", "qwen2", tmp_path, dtype=dtype)
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
@torch.no_grad()
def test_small_changes_of_dora_s_magnitudes_reach_the_output(dtype, tmp_path):
    """bfloat16 has steps of 0.4 and 0.8 % around 1."""
    model = foreign(tmp_path, dtype, use_dora=True, target_modules="o_proj,down_proj")  # without biases
    for name, layer in adapted_layers(model).items():
        x, magnitude = inputs(layer, dtype), layer.lora.magnitude.clone()
        before = layer(x)
        for factor in (0.999, 1.001, 1.003):
            layer.lora.magnitude.copy_(magnitude * factor)
            after = layer(x)
            assert before.dtype == after.dtype == dtype
            # y is rounded twice, which moves the mean a little; without the small factor the gain is 1.
            assert gain(after, before) == pytest.approx(factor, abs=4e-4), name


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_dora_s_output_is_that_of_the_merge_in_float32(dtype, tmp_path):
    """alpha / rank is 4/3, which bfloat16 rounds by 0.2 %: the adapter's part must not shrink with it."""
    model = foreign(tmp_path, dtype, use_dora=True, alpha=4.0)
    for name, layer in adapted_layers(model).items():
        x = inputs(layer, dtype)
        layer.lora.magnitude.mul_(1 + 0.02 * torch.rand(len(layer.weight), generator=torch.Generator().manual_seed(3)))
        wanted = F.linear(x.double(), layer.weight.double() + layer.lora.delta(layer).double())
        ours = layer(x).double() - (0 if layer.bias is None else layer.bias.double())
        base = F.linear(x.double(), layer.weight.double())
        assert float((ours - wanted).norm() / wanted.norm()) < 2 * torch.finfo(dtype).eps, name
        assert gain(ours - base, wanted - base) == pytest.approx(1, abs=1.5e-3), name


@pytest.mark.parametrize("base, product", [HALF, HALF[::-1]])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_base_of_one_half_precision_under_autocast_of_the_other(tools, base, product, use_dora):
    model = tools.model(dtype=base)
    apply_lora(model, rank=3, use_dora=use_dora)
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=product):
        logits = model.train()(ids)
    logits.float().mean().backward()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all()
    assert any(p.grad.any() for name, p in model.named_parameters() if name.endswith("lora.B.weight"))


# ---- the compiler ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole_and_only_once(tools, training, tmp_path):
    """``fullgraph`` allows no break; a switch to another adapter, of another rank and alpha, does not recompile."""
    torch._dynamo.reset()
    model = tools.model()
    apply_lora(model, rank=3, alpha=5, adapter_name="first")
    tools.train(model, 2)
    add_adapter(model, "second", rank=5, alpha=2)
    tools.train(model, 2)
    other = tools.model()
    apply_lora(other, rank=2, alpha=3)
    tools.train(other, 2)
    save_lora(other, tmp_path / "third")
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(0))
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model.train(training)
    model.block_attention = False  # which is for training without a compiler
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    outputs = []
    for step in range(6):
        if step == 4:
            load_lora(model, tmp_path / "third", adapter_name="third")
            torch.testing.assert_close(tools.logits(model), tools.logits(other), rtol=0, atol=1e-12)
        else:
            set_adapter(model, ("first", "second")[step % 2])
        with torch.set_grad_enabled(training):
            wanted, output = model.forward(ids), compiled(ids)
        torch.testing.assert_close(output, wanted, rtol=0, atol=1e-10)
        outputs.append(output.detach())
    assert len(compilations) == 1
    assert not torch.allclose(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    torch._dynamo.reset()
