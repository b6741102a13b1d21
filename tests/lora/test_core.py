"""LoRA itself: the formula, and a model's way through it with ``core.py`` alone."""

import ast
import copy
import importlib.util
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minillm.errors import UserError
from minillm.lora import core, more
from minillm.lora.more.layers import EfficientLoRA


@pytest.fixture
def alone():
    """``core.py`` as a module of its own, loaded from its file."""
    spec = importlib.util.spec_from_file_location("core_alone", core.__file__)
    module = importlib.util.module_from_spec(spec)
    sys.modules["core_alone"] = module  # dataclasses and pickle look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["core_alone"]


class Net(nn.Module):
    """A small model that is not of minillm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.hidden, self.lm_head = nn.Linear(6, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4)

    def forward(self, x):
        return self.lm_head(self.hidden(self.read(x).tanh()).tanh())


X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(2))


def train(model, lora_parameters, n_steps=20):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(n_steps):
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adapted(lora=core, n_steps=20, **settings):
    model = Net()
    lora.apply_lora(model, generator=torch.Generator().manual_seed(3), **({"rank": 3} | settings))
    train(model, lora.lora_parameters, n_steps)
    return model


# ---- alone -------------------------------------------------------------------------------------------------------


def test_it_imports_nothing_else_of_the_package():
    with open(core.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] == "minillm"} == {"minillm.errors"}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"torch", "minillm"}
    assert more.__name__ not in names


def test_a_model_can_be_adapted_trained_merged_saved_and_loaded_with_it_alone(alone, tmp_path):
    base = Net()
    model = Net()
    assert alone.apply_lora(model, rank=3, alpha=6, dropout=0.1) == ["read", "hidden"]  # not the output layer
    assert torch.equal(model(X), base(X))  # B is zero
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{layer}.lora.{key}.weight" for layer in ("read", "hidden") for key in "AB"}
    losses = train(model, alone.lora_parameters)
    assert losses[-1] < losses[0]
    model.eval()
    wanted = model(X)
    with alone.disable_lora(model):
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), wanted)

    alone.save_lora(model, tmp_path / "x.pth")
    loaded = Net().eval()
    state = torch.get_rng_state()
    alone.load_lora(loaded, tmp_path / "x.pth")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(X), wanted)
    assert train(loaded, alone.lora_parameters, 1)

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        alone.merge_lora(model)
        torch.testing.assert_close(model(X), wanted)
        alone.unmerge_lora(model)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    alone.merge_lora(model, keep_base=False)
    torch.testing.assert_close(model(X), wanted)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert set(vars(model)) == set(vars(base))
    assert all(p.requires_grad for p in model.parameters())

    alone.remove_lora(loaded)
    assert torch.equal(loaded(X), base(X))
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), base.parameters(), strict=True))


def test_our_model_is_adapted_by_core_and_by_the_package_alike(tools, tmp_path):
    """The same settings and generator: the same adapter; one file, which both read."""
    import minillm.lora

    logits = []
    for lora in (core, minillm.lora):
        model = tools.model()
        lora.apply_lora(model, rank=3, alpha=5, generator=torch.Generator().manual_seed(1))
        tools.train(model, 3)
        logits.append(tools.logits(model))
        lora.save_lora(model, tmp_path / f"{lora.__name__}.pth")
        if lora is core:
            again = tools.model()
            minillm.lora.load_lora(again, tmp_path / "minillm.lora.core.pth")
            torch.testing.assert_close(tools.logits(again), logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-12)


# ---- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [core.LoRA, EfficientLoRA])
def test_the_layer_is_its_formula(cls):
    layer = nn.Linear(11, 7).double().requires_grad_(False)
    core.attach(layer, cls(11, 7, rank=3, like=layer.weight))
    a, b = layer.lora.A.weight, layer.lora.B.weight
    with torch.no_grad():
        a.normal_(generator=torch.Generator().manual_seed(0))
        b.normal_(generator=torch.Generator().manual_seed(1))
        layer.lora.scaling.fill_(0.7)
    x = torch.randn(5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = F.linear(x, layer.weight + 0.7 * b @ a, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=0, atol=1e-12)
    found = torch.autograd.grad(layer(x).square().sum(), (a, b))
    for ours, reference in zip(found, torch.autograd.grad(wanted.square().sum(), (a, b)), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cls", [core.LoRA, EfficientLoRA])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_narrow_but_a_and_b_are_not(cls, dtype):
    layer = nn.Linear(64, 64).to(dtype).requires_grad_(False)
    core.attach(layer, cls(64, 64, rank=2, like=layer.weight))
    nn.init.normal_(layer.lora.A.weight, std=0.1)
    nn.init.normal_(layer.lora.B.weight)
    layer.lora.scaling.fill_(4 / 3)  # which bfloat16 rounds by 0.2 %
    x = torch.randn(512, 64).to(dtype)
    y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert layer.lora.A.weight.dtype == layer.lora.A.weight.grad.dtype == torch.float32
    wanted = F.linear(x.double(), layer.lora.delta(layer).double())
    change = y.double() - F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert ((change * wanted).sum() / wanted.square().sum()).item() == pytest.approx(1, abs=1.5e-3)


def test_each_layer_of_a_loop_computes_with_its_own_weight_and_detaching_restores_the_class():
    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    before = set(vars(layers[0])), set(layers[0].state_dict())
    x = torch.randn(2, 4)
    for layer in layers:
        core.attach(layer, core.LoRA(4, 4, rank=2, like=layer.weight))
        layer.lora.initialize()
        nn.init.normal_(layer.lora.B.weight)
    for layer in layers:
        torch.testing.assert_close(layer(x), x @ (layer.weight + layer.lora.B.weight @ layer.lora.A.weight).T)
        assert layer.forward.args[0] is layer
        core.detach(layer)
        assert (set(vars(layer)), set(layer.state_dict())) == before
        assert layer.forward.__func__ is nn.Linear.forward


def test_copies_are_independent():
    """A policy moves on, its reference stays; a closure as ``forward`` would follow it."""
    model = adapted()
    wanted = model(X)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    train(model, core.lora_parameters, 2)
    assert not torch.equal(model(X), wanted)
    assert all(torch.equal(each(X), wanted) for each in copies)
    moved = model(X)
    train(copies[0], core.lora_parameters, 2)
    assert torch.equal(model(X), moved)


# ---- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 0}, "rank is 0: give a whole number"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"target_modules": "read,query"}, "no layer is called query: there are hidden, lm_head, read, and the words"),
    ],
)
def test_settings_that_do_not_fit_change_nothing(settings, words):
    model = Net()
    with pytest.raises(UserError, match=words):
        core.apply_lora(model, **settings)
    assert not core.adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_twice_and_never():
    model = adapted(n_steps=1)
    with pytest.raises(UserError, match="has an adapter already"):
        core.apply_lora(model)
    with pytest.raises(UserError, match="not merged"):
        core.unmerge_lora(model)
    core.merge_lora(model)
    for refused in (core.merge_lora, lambda model: core.disable_lora(model).__enter__()):
        with pytest.raises(UserError, match="merged into the weights: unmerge_lora first"):
            refused(model)
    for refused in (core.merge_lora, core.unmerge_lora):
        with pytest.raises(UserError, match=r"no adapter|not merged"):
            refused(Net())


def test_a_file_for_another_model(tmp_path):
    core.save_lora(adapted(n_steps=1), tmp_path / "x.pth")
    other = Net()
    other.hidden = nn.Linear(16, 17)
    with pytest.raises(UserError, match="does not fit this model"):
        core.load_lora(other, tmp_path / "x.pth")
    assert not core.adapted_layers(other)
