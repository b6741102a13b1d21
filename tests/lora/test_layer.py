"""One adapted layer: the product and its gradients, and that a wrapped layer can be treated as any other."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minillm.kernels.low_rank_linear import low_rank_linear
from minillm.kernels.swiglu import swiglu
from minillm.lora import add_adapter, apply_lora, load_lora, merge_lora, remove_lora, save_lora, set_adapter
from minillm.lora.layer import DoRA, EmbeddingLoRA, LoRA, adapted_layers, bind, unbind

KINDS = {"lora": {}, "dora": {"use_dora": True}, "embedding": {"target_modules": "embed_tokens,q_proj"},
         "pissa": {"init": "pissa"}, "whole": {"modules_to_save": ("lm_head",), "bias": "all"}}  # fmt: skip


def drawn(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(dtype=torch.float64, n_in=11, n_out=7, rank=3):
    """Return x (2, 5, in), W, bias, A, B, s, which all want a gradient but s."""
    sizes = ((2, 5, n_in), (n_out, n_in), (n_out,), (rank, n_in), (n_out, rank))
    trained = [drawn(*size, seed=i).to(dtype).requires_grad_() for i, size in enumerate(sizes)]
    return [*trained, torch.tensor(0.7, dtype=dtype)]


def adapted(tools, **settings):
    """Return a model with an adapter whose every part is away from its start."""
    model = tools.model()
    apply_lora(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(1), **settings)
    tools.train(model, 3)
    model.zero_grad()
    return model


# ---- the product -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_every_gradient_are_those_of_the_formula(with_bias):
    given, again = operands(), operands()
    results = []
    for (x, weight, bias, a, b, s), fast in ((given, True), (again, False)):
        bias = bias if with_bias else None
        y = low_rank_linear(x, weight, bias, a, b, s) if fast else F.linear(x, weight, bias) + s * (x @ a.T @ b.T)
        y.square().sum().backward()
        results.append(y)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    for ours, wanted in zip(given[:5], again[:5], strict=True):
        assert (ours.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=1e-10)


def test_gradients_against_finite_differences():
    x, weight, bias, a, b, s = operands()
    assert torch.autograd.gradcheck(lambda *given: low_rank_linear(*given, s), (x, weight, bias, a, b))


def test_frozen_weight_gets_no_gradient_and_is_not_copied():
    x, weight, _, a, b, s = operands()
    weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = low_rank_linear(x, weight, None, a, b, s)
    y.sum().backward()
    assert weight.grad is None
    own = {t.data_ptr() for t in (x, weight, a, b, s)}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 10 * 3  # the thin product (N, R) alone


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("recompute", [False, True])
def test_an_input_that_can_be_made_again_is_not_kept(dropout, recompute):
    """The product of SwiGLU: the layer behind it keeps gate and up with it, and the gradients stay what they were."""
    gate, up, *more = (drawn(2, 5, 11, seed=i).requires_grad_() for i in (0, 1, 0, 1))
    _, weight, _, a, b, s = operands()
    weight.requires_grad_(False)

    def run(gate, up, product):
        return low_rank_linear(product(gate, up), weight, None, a, b, s, dropout).square().sum()

    kept = []
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = run(gate, up, swiglu)
    large = {t.data_ptr() for t in kept if t.shape == gate.shape}
    assert large == {gate.data_ptr(), up.data_ptr()}
    if recompute:
        torch.manual_seed(0)
        loss = checkpoint(run, gate, up, swiglu, use_reentrant=False)
    found = torch.autograd.grad(loss, (gate, up, a, b))
    torch.manual_seed(0)
    plain = run(*more, lambda gate, up: F.silu(gate) * up)
    for ours, wanted in zip(found, torch.autograd.grad(plain, (*more, a, b)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_dropout_is_drawn_again_in_the_backward_pass():
    """The mask is read off a product with W = 0; with it the gradients must be those of the formula."""
    n_in = 64
    x, _, _, a, b, s = operands(n_in=n_in)
    zeros = torch.zeros(7, n_in, dtype=torch.float64)
    p = 0.25
    mask_of = nn.Parameter(torch.eye(n_in, dtype=torch.float64))
    torch.manual_seed(3)
    y = low_rank_linear(torch.ones_like(x), torch.zeros(n_in, n_in).double(), None, torch.eye(n_in).double(),
                        mask_of, torch.ones(()).double(), p)  # fmt: skip
    mask = y.detach()  # (2, 5, in), zeros and 1/(1 - p)
    assert set(mask.unique().tolist()) <= {0.0, 1 / (1 - p)}
    assert 0.15 < (mask == 0).double().mean() < 0.35
    torch.manual_seed(3)
    low_rank_linear(x, zeros, None, a, b, s, p).square().sum().backward()
    again = operands(n_in=n_in)
    (s * ((again[0] * mask) @ again[3].T @ again[4].T)).square().sum().backward()
    for ours, wanted in ((x, again[0]), (a, again[3]), (b, again[4])):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=0, atol=1e-9)
        assert ours.grad.abs().max() > 0


def test_dropout_keeps_the_mean():
    x, weight, _, a, b, s = operands(n_in=300)
    low = torch.stack([low_rank_linear(x, weight, None, a, b, s, 0.4).detach() for _ in range(600)]).mean(0)
    wanted = low_rank_linear(x, weight, None, a, b, s).detach()
    base = F.linear(x, weight).detach()
    assert float((low - wanted).norm() / (wanted - base).norm()) < 0.1  # 600 draws spread by 0.03


def test_dropout_is_off_in_evaluation_mode(tools):
    model = adapted(tools, dropout=0.5)
    assert torch.equal(tools.logits(model), tools.logits(model))
    batch = tools.batch()
    assert tools.loss(model.train(), batch) != tools.loss(model, batch)


def test_no_rows_give_no_rows():
    x, weight, bias, a, b, s = operands()
    y = low_rank_linear(x[:0], weight, bias, a, b, s)
    assert y.shape == (0, 5, 7)
    y.sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_narrow_and_parameters_wide(dtype):
    x, weight, bias, a, b, s = operands(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y = low_rank_linear(x, weight, bias, a, b, s)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert {a.grad.dtype, b.grad.dtype, x.grad.dtype} == {torch.float32}
    exact = F.linear(x, weight, bias) + s * (x @ a.T @ b.T)
    assert float((y.float() - exact).norm() / exact.norm()) < 1e-2  # eight bits of mantissa


def test_frozen_weights_may_be_narrow():
    layer = nn.Linear(11, 7).bfloat16().requires_grad_(False)
    bind(layer, LoRA(11, 7, rank=2, like=layer.weight))
    nn.init.normal_(layer.lora.B.weight)
    layer(torch.randn(3, 11).bfloat16()).float().sum().backward()
    assert layer.lora.A.weight.dtype == layer.lora.A.weight.grad.dtype == torch.float32
    assert layer.weight.grad is None


# ---- DoRA and embeddings -----------------------------------------------------------------------------------------


def test_dora_is_its_formula_and_its_row_norms_are_constants():
    layer = nn.Linear(11, 7).double().requires_grad_(False)
    lora = DoRA(11, 7, rank=3, like=layer.weight)
    bind(layer, lora)
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
    torch.testing.assert_close(lora.row_norms(layer.weight), turned.norm(dim=1), rtol=0, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    pairs = ((lora.A.weight, a), (lora.B.weight, b), (lora.magnitude, m), (x, again))
    for ours, reference in pairs:
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-10)


def test_embedding_is_its_formula():
    layer = nn.Embedding(9, 6).double().requires_grad_(False)
    lora = EmbeddingLoRA(9, 6, rank=2, like=layer.weight)
    bind(layer, lora)
    nn.init.normal_(lora.B.weight)
    ids = torch.tensor([[1, 1, 8], [0, 3, 1]])
    wanted = F.embedding(ids, layer.weight + lora.scaling * (lora.B.weight @ lora.A.weight).T)
    torch.testing.assert_close(layer(ids), wanted, rtol=0, atol=1e-12)
    layer(ids).sum().backward()
    assert lora.A.weight.grad[:, [2, 4, 5, 6, 7]].abs().max() == 0  # ids that do not occur
    assert lora.A.weight.grad[:, [0, 1, 3, 8]].abs().min() > 0


# ---- a wrapped layer is a layer ----------------------------------------------------------------------------------


def test_every_layer_of_a_loop_computes_with_its_own_weight():
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    for layer in layers:
        bind(layer, LoRA(4, 4, rank=2, like=layer.weight))
        nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(2, 4)
    for layer in layers:
        wanted = x @ (layer.weight + layer.lora.B.weight @ layer.lora.A.weight).T
        torch.testing.assert_close(layer(x), wanted)


def test_unbinding_gives_the_class_forward_back():
    layer = nn.Linear(4, 4)
    before = set(vars(layer)), set(layer.state_dict())
    bind(layer, LoRA(4, 4, rank=2, like=layer.weight))
    assert "forward" in vars(layer)
    unbind(layer)
    assert (set(vars(layer)), set(layer.state_dict())) == before
    assert layer.forward.__func__ is nn.Linear.forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_independent(tools, kind):
    model = adapted(tools, **KINDS[kind])
    wanted = tools.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(tools.logits(twin), wanted)
    tools.train(model, 2, first=20)
    assert not torch.equal(tools.logits(model), wanted)
    assert torch.equal(tools.logits(twin), wanted)  # the policy has moved on, its reference stays
    kept = tools.logits(model)
    tools.train(twin, 2, first=30)
    assert torch.equal(tools.logits(model), kept)
    for layer in adapted_layers(twin).values():
        assert layer.forward.args[0] is layer
    before = tools.logits(tools.model())
    assert torch.equal(tools.logits((remove_lora(twin), twin)[1]), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_stored_model_comes_back(tools, kind, how):
    model = adapted(tools, **KINDS[kind])
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        again = torch.load(stored, weights_only=False)
    assert torch.equal(tools.logits(again), tools.logits(model))
    assert tools.train(again, 2, first=9) == tools.train(model, 2, first=9)
    assert torch.equal(tools.logits(merge_lora(again)), tools.logits(merge_lora(model)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_models_survive_the_same(tools, family):
    model = tools.hf(family)
    apply_lora(model, rank=3, use_dora=True)
    tools.train(model, 2)
    wanted = tools.logits(model)
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    tools.train(model, 2, first=9)
    assert torch.equal(tools.logits(twin), wanted)
    assert torch.equal(tools.logits(again), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_narrows_the_model_and_not_the_adapter(tools, kind):
    model = adapted(tools, **KINDS[kind]).float()
    wanted = tools.logits(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".lora." in n}
    model.to(torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])  # not rounded on the way
    narrow = tools.logits(model)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wanted).norm() / wanted.norm()) < 2e-2  # eight bits of mantissa, two layers
    model.double()
    assert {p.dtype for n, p in model.named_parameters() if ".lora." in n} == {torch.float64}


def test_a_device_move_takes_all_along(tools):
    model = adapted(tools, init="pissa").to("meta")
    places = {t.device.type for t in (*model.parameters(), *model.buffers())}
    layer = next(iter(adapted_layers(model).values()))
    assert places | {layer.lora.scaling.device.type, *(t.device.type for t in layer.lora.initial)} == {"meta"}


@pytest.mark.cuda
def test_moves_to_a_gpu_and_back(tools):
    model = adapted(tools)
    wanted = tools.logits(model)
    ids = torch.randint(37, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        there = model.cuda().eval()(ids.cuda()).cpu()
    torch.testing.assert_close(there, wanted, rtol=0, atol=1e-10)
    assert torch.equal(tools.logits(model.cpu()), wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(tools, dropout, reentrant):
    layer = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).double()
    apply_lora(layer, rank=2, dropout=dropout, generator=torch.Generator().manual_seed(0))
    for adapted_layer in adapted_layers(layer).values():
        nn.init.normal_(adapted_layer.lora.B.weight)
    x = drawn(6, 16).requires_grad_()
    found = []
    for recompute in (False, True):
        torch.manual_seed(4)
        y = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=True) if recompute else layer(x)
        y.square().sum().backward()
        found.append([x.grad.clone()] + [p.grad.clone() for p in layer.parameters() if p.requires_grad])
        layer.zero_grad()
        x.grad = None
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert one.abs().max() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_our_model(tools, dropout):
    model = adapted(tools, dropout=dropout)
    found = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        torch.manual_seed(4)
        tools.loss(model, tools.batch()).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-12)


# ---- the compiler ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole_and_never_again(tools, training, tmp_path):
    """``fullgraph`` allows no break; a switch to another adapter, of another rank and alpha, costs no compilation."""
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
    seen = []
    for step in range(6):
        if step == 4:
            load_lora(model, tmp_path / "third", adapter_name="third")
            torch.testing.assert_close(tools.logits(model), tools.logits(other), rtol=0, atol=1e-12)
        else:
            set_adapter(model, ("first", "second")[step % 2])
        with torch.set_grad_enabled(training):
            wanted, found = model.forward(ids), compiled(ids)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
        seen.append(found.detach())
    assert len(compilations) == 1
    assert not torch.allclose(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    torch._dynamo.reset()
