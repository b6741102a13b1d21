"""Weights in eight bits: the error of each number, the layers that have them, and decoding with them."""

from functools import partial

import pytest
import torch
from torch import nn

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.inference import generate
from minillm.lora import apply_lora
from minillm.model import Transformer
from minillm.serving import Engine
from minillm.serving.decode import DotProducts
from minillm.serving.int8 import Int8Linear, to_int8


def tiny(**overrides) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    return Transformer(ModelConfig(**(sizes | overrides)))


@pytest.mark.parametrize("bias", [False, True])
def test_each_weight_is_within_half_a_scale(bias):
    linear = nn.Linear(7, 5, bias=bias)
    with torch.no_grad():
        linear.weight[2] = 0  # a row without a scale
        linear.weight[3] *= 1000
    layer, x = Int8Linear(linear), torch.randn(2, 3, 7)
    numbers = layer.weight.float() * layer.scale[:, None]
    assert ((numbers - linear.weight).abs() <= layer.scale[:, None] * 0.5001).all()
    assert (layer.weight.abs().amax(dim=1) == torch.tensor([127, 127, 0, 127, 127])).all()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, numbers, linear.bias), atol=1e-3, rtol=1e-5)


def test_which_layers_change():
    model = tiny(num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    to_int8(model)
    kinds = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    projections = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"]
    assert kinds == {"lm_head", *projections}
    for name, parameter in model.named_parameters():  # the embedding, norms, routers and experts
        assert torch.equal(parameter, before[name])
    error = model.lm_head.weight.float() * model.lm_head.scale[:, None] - before["model.embed_tokens.weight"]
    assert (error.abs() <= model.lm_head.scale[:, None] * 0.5001).all()


def test_the_engine_equals_generate_with_the_same_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny(num_hidden_layers=1)
    to_int8(model)
    engine = Engine(model, page_len=4, compile=True)
    prompts = [[5, 9, 2], [7], [11, 3, 8, 60, 1]]
    requests = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    engine.run()
    assert [request.new_ids for request in requests] == [
        generate(model, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in prompts
    ]


def test_an_adapter_is_refused():
    model = tiny()
    apply_lora(model)
    with pytest.raises(UserError, match="merge it"):
        to_int8(model)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2])
def test_dot_products_equal_linear_layers(bias, n_rows, monkeypatch):
    linear, x = nn.Linear(24, 10, bias=bias), torch.randn(1, n_rows, 24)
    expected = linear(x)
    calls = []
    summed = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, dim: calls.append(dim) or summed(self, dim))
    with DotProducts():
        found = linear(x)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert bool(calls) == (n_rows == 1)
