"""Adapters of shared experts: an ungated one is stored doubled, and so is what is added to it."""

import peft
import pytest
import torch
import transformers

from minillm.config import ModelConfig
from minillm.hub.huggingface import load_model, save_model
from minillm.lora import apply_lora, load_lora, merge_lora, save_lora
from minillm.lora.core import adapted_layers
from minillm.model import Transformer

SHAPE = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
SETTINGS = [{}, {"use_dora": True}, {"modules_to_save": ("shared_expert",), "target_modules": "q_proj"}]


def theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


@pytest.mark.parametrize("settings, gated", [*((settings, False) for settings in SETTINGS), ({}, True)])
@torch.no_grad()
def test_an_adapter_means_the_same_to_peft(settings, gated, tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, shared_expert_gate=gated))
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    save_model(model, tmp_path / "base")
    before = model.eval()(IDS)
    apply_lora(model, rank=3, **settings)
    for layer in adapted_layers(model).values():
        layer.lora.B.weight.normal_(std=0.3)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 2:
            parameter.add_(0.05 * torch.randn_like(parameter))
    wanted = model(IDS)
    assert float((wanted - before).norm() / before.norm()) > 0.05
    for form in ("adapter", "adapter.pth"):
        save_lora(model, tmp_path / form)
        again = load_model(tmp_path / "base").eval()
        load_lora(again, tmp_path / form)
        torch.testing.assert_close(again(IDS), wanted, rtol=1e-5, atol=1e-6)
    foreign = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "adapter").eval()
    assert float((foreign(IDS).logits - wanted).norm() / wanted.norm()) < 1e-5
    same = theirs(tmp_path / "base")
    load_lora(same, tmp_path / "adapter")  # its weights are recognized, although they are twice ours
    assert float((same(IDS).logits - wanted).norm() / wanted.norm()) < 1e-5
    save_model(merge_lora(model, keep_base=False), tmp_path / "merged")
    assert float((theirs(tmp_path / "merged")(IDS).logits - wanted).norm() / wanted.norm()) < 1e-5
