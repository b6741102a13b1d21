"""Adapters are added where the settings say, nothing else is trained, and they are removed without a trace."""

import pytest
import torch
from torch import nn

from minillm.errors import UserError
from minillm.lora import LoRAConfig, add_adapter, apply_lora, lora_parameters, remove_lora
from minillm.lora.core import adapted_layers
from minillm.losses import causal_lm_loss

KINDS = {
    "lora": {}, "dora": {"use_dora": True}, "embedding": {"target_modules": "embed_tokens,q_proj"},
    "pissa": {"init": "pissa"}, "olora": {"init": "olora", "use_rslora": True}, "orthogonal": {"init": "orthogonal"},
    "biases": {"bias": "all"}, "own biases": {"bias": "lora_only", "target_modules": "q_proj"},
    "whole output": {"modules_to_save": ("lm_head",)}, "whole embedding": {"modules_to_save": ("embed_tokens",)},
    "both whole": {"modules_to_save": ("embed_tokens", "lm_head")},
    "residual of a tied weight": {"init": "pissa", "target_modules": "lm_head,q_proj"},
}  # fmt: skip


def trace(model):
    """Return all that an adapter could leave behind: names, values, what trains, and attributes of every module."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    shared = len(list(model.parameters()))
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    children = {name: sorted(module._modules) for name, module in model.named_modules()}
    return state, (trains, shared, attributes, children, vars(model).get("config"))


# Every kind on our model, and on transformers' those that touch what is tied or whole.
CASES = [("ours", kind) for kind in KINDS]
CASES += [("qwen3", kind) for kind in ("dora", "both whole", "residual of a tied weight")]
CASES += [("qwen2", kind) for kind in ("lora", "biases", "whole output")]


@pytest.mark.parametrize("which, kind", CASES)
def test_the_model_starts_unchanged_and_removal_leaves_no_trace(tools, kind, which):
    model = tools.model() if which == "ours" else tools.hf(which)
    model.lm_head.weight.requires_grad_(True)
    next(model.parameters()).requires_grad_(False)  # what was frozen before stays frozen afterwards
    state, rest = trace(model)
    logits = tools.logits(model)
    config = repr(getattr(model, "config", None))
    apply_lora(model, rank=3, **KINDS[kind])
    # The model starts unchanged; orthogonal B is small, not zero.
    torch.testing.assert_close(tools.logits(model), logits, rtol=0, atol=2e-2 if kind == "orthogonal" else 1e-12)
    tools.train(model, 2)
    assert not torch.equal(tools.logits(model), logits)
    remove_lora(model)
    again, rest_again = trace(model)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert rest_again[:-1] == rest[:-1]
    assert repr(getattr(model, "config", None)) == config
    assert torch.equal(tools.logits(model), logits)
    apply_lora(model, rank=3, **KINDS[kind])  # and it can be adapted again


def test_nothing_else_is_trained_and_no_other_gradient_is_computed(tools):
    model = tools.model()
    names = apply_lora(model, rank=3)
    assert names == [f"model.layers.{i}.{part}" for i in (0, 1) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora.{key}.weight" for name in names for key in "AB"}
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    tools.train(model, 3)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trained)
        assert name in trained or torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    "settings, found",
    [
        ({"target_modules": "attention"}, "qkvo"),
        ({"target_modules": "mlp", "layers": (1,)}, ["1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"]),
        ({"target_modules": r".*0.*\.(q|down)_proj"}, ["0.self_attn.q_proj", "0.mlp.down_proj"]),
        ({"target_modules": ("1.self_attn.k_proj",)}, ["1.self_attn.k_proj"]),
        ({"target_modules": "lm_head"}, ["lm_head"]),
        ({"target_modules": "embed_tokens, lm_head"}, ["embed_tokens", "lm_head"]),
    ],
)
def test_targets(tools, settings, found):
    names = LoRAConfig(**settings).find_targets(tools.hf("llama"))
    if found == "qkvo":
        found = [f"{i}.self_attn.{letter}_proj" for i in (0, 1) for letter in "qkvo"]
    assert [name.removeprefix("model.").removeprefix("layers.") for name in names] == found


def test_layers_that_are_trained_whole_are_not_adapted_too(tools):
    names = apply_lora(tools.model(), target_modules="lm_head,q_proj,k_proj", modules_to_save=("k_proj",))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"lm_head", "q_proj"}
    names = apply_lora(tools.model(), modules_to_save=("mlp",))
    assert {name.rsplit(".", 1)[-1] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_past_whose_forward_the_model_computes_are_left_out():
    """An adapter there would learn nothing, or be lost when it is merged."""
    weighed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), Doubling(8, 8), weighed, nn.TransformerEncoderLayer(8, 2, 16))
    for name, words in (
        ("1", "a Doubling, which computes in its own way"),
        ("2", "ParametrizedLinear"),
        ("out_proj", "a MultiheadAttention, which does not call"),
        ("linear1", "TransformerEncoderLayer"),
    ):
        with pytest.raises(UserError, match=words):
            apply_lora(model, target_modules=name)
    assert apply_lora(model, rank=2) == ["0"]


def test_all_linear_goes_with_names(tools):
    assert "lm_head" in apply_lora(tools.model(), target_modules="all-linear,lm_head", layers=None)


def test_what_fails_for_another_reason_leaves_nothing_either(tools, monkeypatch):
    model = tools.model()

    def full(*_, **__):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr("minillm.lora.more.apply.ensure_slots", full)
    with pytest.raises(RuntimeError):
        apply_lora(model, rank=3)
    assert not hasattr(model, "lora_adapters")
    assert all(p.requires_grad for p in model.parameters())


def test_a_generator_draws_the_same_again_and_nothing_else_draws(tools):
    def drawn(seed):
        model = tools.model()
        apply_lora(model, rank=3, generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.flatten() for p in lora_parameters(model)])

    model = tools.model()
    before = torch.get_rng_state()
    apply_lora(model, rank=3, generator=torch.Generator())
    add_adapter(model, "wider", rank=5, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn(5), drawn(5))
    assert not torch.equal(drawn(5), drawn(6))


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"rank": 0}, "rank is 0"),
        ({"target_modules": "query"}, r"no layer is called query: there are down_proj, embed_tokens, gate_proj, "
                                      r"k_proj, lm_head, o_proj, q_proj, up_proj, v_proj, and the words all-linear"),
        ({"target_modules": "q_proj,query,c_attn"}, "no layer is called query, c_attn"),
        ({"target_modules": r".*\.qkv"}, r"no layer is called \.\*\\\.qkv"),
        ({"layers": (7,)}, "layers 7: the model has no such block; its blocks are 0 to 1"),
        ({"rank_pattern": {"what": 3}}, "the pattern 'what' matches no adapted layer: there are down_proj, gate_proj"),
        ({"target_modules": ""}, "target_modules is '': give all-linear, or names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head': give names as a tuple"),
        ({"target_modules": "*q_proj"}, r"'\*q_proj' is not a regular expression"),
        ({"modules_to_save": ("score",)}, "modules_to_save: no layer is called score: there are .*lm_head"),
        ({"rank": 25, "init": "pissa"}, "rank 25: init 'pissa' needs at most 24"),
        ({"target_modules": "embed_tokens", "use_dora": True}, "use_dora: .*embed_tokens is an embedding"),
        ({"adapter_name": "a.b"}, "give a name without dots"),
        ({"layers": (1, 2, 3)}, "layers 2, 3: the model has no such block"),
        ({"bias": "lora_only", "target_modules": "mlp"}, "bias='lora_only' .*: no adapted layer has a bias"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_changed(tools, settings, words):
    model = tools.model()
    state, rest = trace(model)
    with pytest.raises(UserError, match=words):
        apply_lora(model, **settings)
    again, rest_again = trace(model)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert again.keys() == state.keys()
    assert rest_again == rest


def test_double_injection_is_refused(tools):
    model = tools.model()
    apply_lora(model, rank=3)
    logits = tools.logits(model)
    with pytest.raises(UserError, match=r"has an adapter already \(default\): add_adapter adds one"):
        apply_lora(model, rank=3)
    with pytest.raises(UserError, match="an adapter 'default' already"):
        add_adapter(model, "default")
    assert torch.equal(tools.logits(model), logits)
    assert all("lora" not in module._modules for layer in adapted_layers(model).values() for module in
               layer.lora.modules())  # fmt: skip


def test_biases_that_are_not_there(tools):
    with pytest.raises(UserError, match=r"bias='all' .*: the model has no bias; leave it out"):
        apply_lora(tools.model(attention_bias=False), bias="all")


def test_nothing_to_remove(tools):
    with pytest.raises(UserError, match="no adapter: apply_lora or load_lora"):
        remove_lora(tools.model())


@pytest.mark.parametrize("targets", ["lm_head,q_proj", "embed_tokens", "lm_head,embed_tokens"])
def test_the_loss_in_the_forward_sees_an_adapted_output_layer(tools, targets):
    """The chunked loss multiplies with the output weight itself, past the layer and its adapter."""
    model = tools.model()
    apply_lora(model, rank=3, target_modules=targets)
    tools.train(model, 2)
    model.zero_grad()
    batch = tools.batch(seed=8)
    given = {"input_ids": batch["input_ids"], "document_ids": batch["attention_mask"] - 1, "targets": batch["targets"]}
    loss_sum, n_targets = causal_lm_loss(model, given)
    wanted = tools.loss(model, batch)
    assert (loss_sum / n_targets).item() == pytest.approx(wanted.item(), abs=1e-12)
    found = torch.autograd.grad(loss_sum / n_targets, list(lora_parameters(model)))
    for ours, reference in zip(found, torch.autograd.grad(wanted, list(lora_parameters(model))), strict=True):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
        assert ours.any()
