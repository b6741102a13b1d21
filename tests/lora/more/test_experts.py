"""Adapters of fused experts: against the slow formula and against peft, which forms the whole product."""

import copy

import peft
import pytest
import torch
import transformers

from minillm.errors import UserError
from minillm.lora import (
    add_adapter,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)  # fmt: skip
from minillm.lora.core import adapted_layers, attach
from minillm.lora.more.experts import ExpertLoRA, factor_shapes
from minillm.lora.more.monitor import Monitor
from minillm.model.moe import ExpertProduct

MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14, "use_qk_norm": True,
           "attention_bias": False}  # fmt: skip
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {
    "experts": ("experts", PARAMETERS, []),
    "down alone": ("experts.down", PARAMETERS[1:], []),
    "with attention": ("experts,q_proj", PARAMETERS, ["q_proj"]),
}


@pytest.fixture
def mixture(tools):
    """Return a model of ours, and transformers' with the same weights."""
    model = tools.model(**MIXTURE)
    config = transformers.AutoConfig.for_model(**model.config.to_hf())
    reference = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa", experts_implementation="eager"
    )
    reference.load_state_dict(model.state_dict())
    return model, tools.exact_norms(reference).double()


def drawn(parameter, seed):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=parameter.dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_product_is_its_formula(tools, dropout):
    product = tools.model(**MIXTURE).model.layers[0].mlp.experts.gate_up
    product.weight.requires_grad_(False)
    attach(product, lora := ExpertLoRA(24, 28, rank=3, dropout=dropout, like=product.weight))
    shapes = factor_shapes(product, 3, use_dora=False)
    assert (lora.A.weight.shape, lora.B.weight.shape) == (shapes["A"], shapes["B"]) == ((3, 5, 24), (28, 3, 5))
    with torch.no_grad():
        lora.A.weight.copy_(drawn(lora.A.weight, 1))
        lora.B.weight.copy_(drawn(lora.B.weight, 2))
        lora.scaling.fill_(0.7)
    x = torch.randn(11, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ends = torch.tensor([4, 4, 5, 9, 10], dtype=torch.int32)  # expert 1 gets nothing, row 10 is padding
    torch.manual_seed(0)
    y = product(x, ends)
    a, b = (p.weight.detach().clone().requires_grad_() for p in (lora.A, lora.B))
    again = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(again, dropout)
    experts = torch.bucketize(torch.arange(10), ends, right=True)
    rows = [product.weight[e] @ again[n] + 0.7 * b[:, :, e] @ (a[:, e] @ kept[n]) for n, e in enumerate(experts)]
    wanted = torch.stack([*rows, torch.zeros_like(rows[0])])
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for ours, reference in ((lora.A.weight, a), (lora.B.weight, b), (x, again)):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=0, atol=1e-10)
    assert not lora.A.weight.grad[:, 1].any()
    assert product.weight.grad is None


@pytest.mark.parametrize("targets", TARGETS)
def test_compared_with_peft(tools, mixture, targets, tmp_path):
    """One step and twenty from an adapter of peft's; then ours back into peft."""
    ours, base = mixture
    wanted, parameters, modules = TARGETS[targets]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_parameters=parameters, target_modules=modules,
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"0.mlp.experts.down_proj": 9},
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.2 * drawn(parameter, seed))
    theirs.save_pretrained(tmp_path / "theirs")
    load_lora(ours, tmp_path / "theirs")
    assert set(adapted_layers(ours)) == set(adapted_names(tools, wanted))
    # Their router and rotary tables round to float32; AdamW's steps enlarge that where a gradient is nearly nothing.
    torch.testing.assert_close(tools.logits(ours), tools.logits(theirs), rtol=0, atol=1e-6)
    losses = [tools.train(model.train(), 20, lr=1e-3) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    save_lora(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(tools.logits(again), tools.logits(ours), rtol=0, atol=1e-6)


def adapted_names(tools, targets):
    return apply_lora(tools.model(**MIXTURE), target_modules=targets)


def test_only_experts_are_trained(tools):
    model = tools.model(**MIXTURE)
    base = tools.logits(model)
    names = apply_lora(model, rank=3, target_modules="experts")
    assert names == [f"model.layers.{i}.mlp.experts.{part}" for i in (0, 1) for part in ("gate_up", "down")]
    assert torch.equal(tools.logits(model), base)
    assert all(isinstance(layer, ExpertProduct) for layer in adapted_layers(model).values())
    tools.train(model, 3)
    assert all(p.grad is not None for p in lora_parameters(model))
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora." not in n)
    with disable_lora(model):
        assert torch.equal(tools.logits(model), base)
    remove_lora(model)
    assert torch.equal(tools.logits(model), base)


def test_switch_mix_merge_and_files(tools, tmp_path):
    model = tools.model(**MIXTURE)
    base = copy.deepcopy(model)
    apply_lora(model, rank=3, target_modules="experts,attention", adapter_name="first")
    tools.train(model, 3)
    first = tools.logits(model)
    add_adapter(model, "second", rank=4, alpha=2, target_modules="experts.down", use_rslora=True)
    tools.train(model, 3)
    second = tools.logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(tools.logits(twin), second)
    for form in ("second", "second.pth"):
        other = copy.deepcopy(base)
        save_lora(model, tmp_path / form)
        load_lora(other, tmp_path / form)
        torch.testing.assert_close(tools.logits(other), second, rtol=0, atol=1e-12)
    merge_lora(model)
    torch.testing.assert_close(tools.logits(model), second, rtol=0, atol=1e-10)
    unmerge_lora(model)
    assert torch.equal(tools.logits(model), second)
    set_adapter(model, "first")
    torch.testing.assert_close(tools.logits(model), first, rtol=0, atol=1e-12)
    deltas = {}
    for name in ("first", "second"):
        set_adapter(model, name)
        deltas[name] = {n: x.lora.delta(x) for n, x in adapted_layers(model).items()}
    set_adapter(model, {"first": 0.5, "second": 2.0})
    with torch.no_grad():
        for name, layer in base.named_modules():
            if name in deltas["first"]:
                layer.weight.add_(0.5 * deltas["first"][name] + 2.0 * deltas["second"].get(name, 0))
    torch.testing.assert_close(tools.logits(model), tools.logits(base), rtol=0, atol=1e-12)


def test_the_monitor_measures_each_expert(tools):
    model = tools.model(**MIXTURE)
    apply_lora(model, rank=3, target_modules="experts")
    monitor = Monitor(model, interval=1)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.0)
    for step in (1, 2, 3):
        before = {n: x.lora.delta(x).detach() for n, x in adapted_layers(model).items()}
        optimizer.zero_grad()
        tools.loss(model, tools.batch(seed=step)).backward()
        monitor.before_update(step)
        optimizer.step()
        row = monitor.after_update(step, optimizer)
    for name, layer in adapted_layers(model).items():
        found, delta, weight = row["layers"][name], layer.lora.delta(layer), layer.weight
        assert found["delta_ratio"] == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-4)
        assert found["update_ratio"] == pytest.approx(((delta - before[name]).norm() / weight.norm()).item(), rel=1e-4)
        ranks = []
        for each in torch.linalg.svdvals(delta.detach()):
            shares = each[each > 1e-6 * each[0]]
            shares = shares / shares.sum()
            ranks.append(torch.exp(-(shares * shares.log()).sum()).item() if len(shares) else 0.0)
        assert found["effective_rank"] == pytest.approx(sum(ranks) / len(ranks), rel=1e-4)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_dora": True}, "use_dora: .*experts.gate_up is a set of experts"),
        ({"init": "pissa"}, "init 'pissa' does not work for experts: choose kaiming or gaussian"),
        ({"init": "orthogonal"}, "init 'orthogonal' does not work for experts"),
        ({"target_modules": "experts.up"}, r"no layer is called experts.up: there are down, .*gate_up"),
    ],
)
def test_what_experts_do_not_support(tools, settings, words):
    with pytest.raises(UserError, match=words):
        apply_lora(tools.model(**MIXTURE), **({"target_modules": "experts"} | settings))


def test_a_dense_model_has_none(tools):
    with pytest.raises(UserError, match=r"no layer is called experts.gate_up, experts.down: there are down_proj"):
        apply_lora(tools.model(), target_modules="experts")


def test_wrong_shapes_are_named(tools, tmp_path):
    model = tools.model(**MIXTURE)
    apply_lora(model, rank=3, target_modules="experts")
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"down.A has shape \(3, 5, 14\) and the model needs \(3, 6, 14\)"):
        load_lora(tools.model(**(MIXTURE | {"num_experts": 6})), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"experts.down: the model has no such layer"):
        load_lora(tools.model(), tmp_path / "adapter")
