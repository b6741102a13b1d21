"""What a checkpoint of an adapter holds: training resumes from it as if it had not been interrupted."""

import copy

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.lora import apply_lora, lora_parameters
from minillm.lora.more.state import load_trained_state, trained_state
from minillm.model import Transformer

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, attention_bias=True,
)  # fmt: skip
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 7}, "layers": (1,)},
    "whole": {"modules_to_save": ("embed_tokens",), "bias": "all"},
    "embedding": {"target_modules": "embed_tokens,q_proj"},
}


def base():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.double()


def adapted(seed, **settings):
    model = base()
    options = {"rank": 3, "alpha": 5.0} | settings
    apply_lora(model, generator=torch.Generator().manual_seed(seed), **options)
    return model


def train(model, optimizer, n_steps, first=0):
    for step in range(first, first + n_steps):
        ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(step))
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model):
    return torch.optim.AdamW(lora_parameters(model), lr=1e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_resumes_bit_by_bit(name):
    whole = adapted(1, **VARIANTS[name])
    optimizer = adam(whole)
    train(whole, optimizer, 3)
    state, moments = trained_state(whole), copy.deepcopy(optimizer.state_dict())
    train(whole, optimizer, 3, first=3)

    resumed = adapted(1, **VARIANTS[name])  # as a script does: the same base, the same seed
    load_trained_state(resumed, state)
    optimizer = adam(resumed)
    optimizer.load_state_dict(moments)
    train(resumed, optimizer, 3, first=3)
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_was_subtracted_from_the_weights_is_the_stored_one(name):
    """Another machine's decomposition may have other signs or other last digits: those of the checkpoint count."""
    trained = adapted(1, **VARIANTS[name])
    train(trained, adam(trained), 2)
    state = trained_state(trained)
    other = adapted(1, **VARIANTS[name])
    for layer in other.modules():
        if "lora" in layer._modules:  # what it subtracted is not what the checkpoint's run subtracted
            with torch.no_grad():
                layer.weight.add_(0.1)
                layer.lora.initial_a *= -2
    load_trained_state(other, state)
    ids = torch.arange(7)[None]
    assert torch.equal(trained(ids), other(ids))


def test_the_state_is_small_and_apart():
    model = adapted(1)
    state = trained_state(model)
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora." in name for name in state)
    before = {name: tensor.clone() for name, tensor in state.items()}
    train(model, adam(model), 1)
    assert all(torch.equal(state[name], before[name]) for name in state)


OTHERS = [({"rank": 4}, "weight"), ({"use_dora": True}, "magnitude"), ({"init": "pissa"}, "A")]


@pytest.mark.parametrize(("settings", "named"), OTHERS)
def test_other_settings_are_refused(settings, named):
    state = trained_state(adapted(1))
    model = adapted(1, **settings)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="other settings") as raised:
        load_trained_state(model, state)
    assert f".{named}" in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
