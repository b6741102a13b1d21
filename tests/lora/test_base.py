"""An adapter is refused on another model than its own, and known again on that one in whatever form."""

import pytest
import torch

from minillm.errors import UserError
from minillm.lora import apply_lora, load_lora, save_lora
from minillm.lora.base import sample_of


def test_another_base_names_both(tools, tmp_path):
    model = tools.model()
    model.origin = "models/one"
    apply_lora(model, rank=3)
    tools.train(model, 2)
    save_lora(model, tmp_path / "adapter")
    other = tools.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.origin = "models/two"
    with pytest.raises(UserError, match=r"was made for models/one, whose weights are not those of models/two"):
        load_lora(other, tmp_path / "adapter")
    assert not hasattr(other, "lora_adapters")
    load_lora(other, tmp_path / "adapter", any_base=True)
    same = tools.model()
    same.origin = "elsewhere/one"  # the weights count, not the place
    load_lora(same, tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").write_text('{"sample": [1%s]}' % ("0" * 400))
    with pytest.raises(UserError, match=r"base\.json is damaged"):
        load_lora(same, tmp_path / "adapter", adapter_name="more")
    (tmp_path / "adapter" / "base.json").unlink()  # of peft's: nothing to compare
    load_lora(other, tmp_path / "adapter", adapter_name="again")


def test_a_base_whose_layer_another_adapter_trains_whole_is_known_again(tools, tmp_path):
    model = tools.model()
    apply_lora(model, rank=3, target_modules="lm_head,q_proj")
    tools.train(model, 2)
    save_lora(model, tmp_path / "one")
    wanted = tools.logits(model)
    other = tools.model()
    apply_lora(other, rank=3, target_modules="q_proj", modules_to_save=("lm_head",), adapter_name="whole")
    tools.train(other, 3, lr=0.1)
    load_lora(other, tmp_path / "one")
    torch.testing.assert_close(tools.logits(other), wanted, rtol=0, atol=1e-12)


def test_the_sample_is_of_the_model_whatever_its_adapter_does(tools):
    model = tools.model()
    names = apply_lora(tools.model(), rank=3)
    wanted = sample_of(model, names)
    assert len(wanted) == 8 * 8
    for settings in ({}, {"init": "pissa"}, {"modules_to_save": ("lm_head",)}):
        model = tools.model()
        apply_lora(model, rank=3, **settings)
        tools.train(model, 2)
        assert sample_of(model, names) == wanted
