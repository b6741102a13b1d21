"""Every variant on transformers' models, compared with peft: values, gradients, 20 steps, files both ways."""

import copy
import json

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from minillm.errors import UserError
from minillm.lora import LoRAConfig, apply_lora, load_lora, lora_parameters, merge_lora, save_lora
from minillm.lora.more.files import KEYS
from minillm.training.optim import adamw

VARIANTS = (
    "lora", "rslora", "dora", "attention of one block", "regular expression", "patterns", "all biases", "own biases",
    "whole output", "embedding",
)  # fmt: skip
BOUND = {torch.float32: 1e-6, torch.float64: 1e-10}


@pytest.fixture
def pair(tools, tmp_path):
    """Return (ours, theirs): the same model with the same adapter, theirs through a file of peft's."""

    def make(family, variant, dtype=torch.float64, **settings):
        base = tools.hf(family, dtype=dtype)
        theirs = tools.peft(base, variant, **settings)
        theirs.save_pretrained(tmp_path / "theirs")
        load_lora(base, tmp_path / "theirs")
        return base.train(), theirs

    return make


def trained(model):
    """Return the trained parameters by peft's names."""
    names = {f".lora.{key}" + (".weight" if key in "AB" else ""): f".{theirs}" for key, theirs in KEYS.items()}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace("base_layer.", "")
            name = name.replace("modules_to_save.", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            if "embed_tokens" in name:
                name = name.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B")
            found[name] = parameter
    return found


def assert_close(ours, theirs, bound):
    """Compare relative to the largest number in the model, or to 1."""
    assert set(ours) == set(theirs)
    scale = max([1.0, *(tensor.detach().abs().max().item() for tensor in theirs.values())])
    errors = {name: (ours[name] - theirs[name]).detach().abs().max().item() for name in theirs}
    assert max(errors.values()) <= bound * scale, errors


def gradients(model):
    return {name: parameter.grad for name, parameter in trained(model).items()}


# Every variant on the family with biases, the main ones on the others too, and in float32.
CASES = [("qwen2", variant, torch.float64) for variant in VARIANTS]
CASES += [("llama", variant, dtype) for variant in ("lora", "rslora", "dora") for dtype in BOUND]
CASES += [("qwen3", variant, torch.float64) for variant in ("dora", "whole output", "embedding")]
CASES += [("qwen2", "embedding", torch.float32)]


@pytest.mark.parametrize("family, variant, dtype", CASES)
def test_one_step_and_twenty(pair, tools, family, variant, dtype):
    ours, theirs = pair(family, variant, dtype)
    assert trained(ours).keys() == trained(theirs).keys()
    batch = tools.batch(seed=5)
    losses = [tools.loss(model, batch) for model in (ours, theirs)]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=BOUND[dtype])
    for loss in losses:
        loss.backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(theirs).values())
    assert_close(gradients(ours), gradients(theirs), BOUND[dtype])
    for model in (ours, theirs):
        model.zero_grad()
    if dtype == torch.float64:
        first, second = (tools.train(model, 20, lr=1e-3) for model in (ours, theirs))
        assert first == pytest.approx(second, abs=1e-10)
        assert first[0] != first[-1]
        assert_close(trained(ours), trained(theirs), 1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_merges_and_opens_the_same(pair, tools, variant, tmp_path):
    ours, theirs = pair("qwen2", variant)
    merged, reference = merge_lora(copy.deepcopy(ours), keep_base=False), theirs.merge_and_unload()
    torch.testing.assert_close(tools.logits(merged), tools.logits(ours), rtol=0, atol=1e-10)
    assert merged.state_dict().keys() == reference.state_dict().keys()
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=1e-10)

    tools.train(ours)
    save_lora(ours, tmp_path / "ours")
    base = tools.hf("qwen2")
    assert not torch.allclose(tools.logits(ours), tools.logits(base))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(tools.logits(theirs), tools.logits(ours), rtol=0, atol=1e-10)
    # and it is byte for byte the file that peft writes of it
    theirs.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "family, settings",
    [("llama", {"init": "pissa"}), ("qwen2", {"init": "pissa", "use_rslora": True}), ("qwen3", {"init": "olora"})],
)
def test_directions_of_the_weight(tools, family, settings, tmp_path):
    """PiSSA and OLoRA: the same A and B and rest of the weight as peft's, and a file for the untouched model."""
    ours, base = (tools.hf(family, dtype=torch.float32) for _ in range(2))  # the only dtype that peft knows here
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=settings["init"],
                        use_rslora=settings.get("use_rslora", False), task_type="CAUSAL_LM"),
    )  # fmt: skip
    apply_lora(ours, rank=3, alpha=5, **settings)
    torch.testing.assert_close(tools.logits(ours), tools.logits(base), rtol=0, atol=1e-5)
    assert_close(trained(ours), trained(theirs), 1e-6)
    assert tools.train(ours, 5) == pytest.approx(tools.train(theirs, 5), abs=1e-5)
    save_lora(ours, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 6
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(tools.logits(opened), tools.logits(ours), rtol=0, atol=1e-5)


def test_learning_rate_ratio_for_b(pair, tools):
    ours, theirs = pair("llama", "lora")
    reference = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.0, betas=(0.9, 0.95)
    )
    optimizer = adamw(ours, learning_rate=1e-3, weight_decay=0.0, betas=(0.9, 0.95), loraplus_ratio=16.0)
    for step in range(20):
        for model, its in ((ours, optimizer), (theirs, reference)):
            tools.loss(model, tools.batch(seed=step)).backward()
            its.step()
            its.zero_grad()
    rates = {id(p): group["lr"] for group in reference.param_groups for p in group["params"]}
    assert {rates[id(p)] for name, p in trained(theirs).items() if "lora_B" in name} == {16e-3}
    assert_close(trained(ours), trained(theirs), 1e-10)


def test_dropout_differs_from_pefts_in_its_mask_alone(pair, tools):
    """Averaged over many masks, the gradients agree."""
    ours, theirs = pair("llama", "lora", lora_dropout=0.25)
    sums = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        for _ in range(100):
            tools.loss(model, tools.batch()).backward()
        sums.append({name: gradient / 100 for name, gradient in gradients(model).items()})
    mine, reference = (torch.cat([g.flatten() for _, g in sorted(each.items())]) for each in sums)
    # The means of 100 draws: their own spread is 0.10, and a forgotten 1/(1 - p) would be 0.25.
    assert float((mine - reference).norm() / reference.norm()) < 0.15
    assert list(lora_parameters(ours))


@pytest.mark.parametrize("wanted", ["norm", "mlp", "layers.0.mlp.up_proj"])
def test_whole_layers_are_named_so_that_both_mean_the_same(tools, tmp_path, wanted):
    """peft takes every module whose name ends with these letters: ``norm`` is an ``input_layernorm`` too."""
    model, base = tools.hf("llama"), tools.hf("llama")
    apply_lora(model, rank=3, target_modules="q_proj", modules_to_save=(wanted,))
    tools.train(model, 2)
    save_lora(model, tmp_path / "ours")
    opened = peft.PeftModel.from_pretrained(tools.hf("llama"), tmp_path / "ours")
    torch.testing.assert_close(tools.logits(opened), tools.logits(model), rtol=0, atol=1e-10)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=[wanted]))
    tools.train(theirs, 2)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tools.hf("llama")
    load_lora(again, tmp_path / "theirs")
    torch.testing.assert_close(tools.logits(again), tools.logits(theirs), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"peft_type": "IA3"}, "only LORA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"ensure_weight_tying": True, "modules_to_save": ["lm_head"]}, "ensure_weight_tying=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the model's weights too: .*path_initial_model"),
    ],
)
def test_pefts_other_methods_are_refused(changes, words):
    raw = peft.LoraConfig(r=3, target_modules=["q_proj"]).to_dict() | {"peft_type": "LORA"} | changes
    with pytest.raises(UserError, match=words):
        LoRAConfig.from_peft(raw)
