"""SwiGLU against its formula."""

import torch

from minillm.config import ModelConfig
from minillm.model.mlp import MLP


def test_formula_and_gradients():
    torch.manual_seed(0)
    mlp = MLP(ModelConfig(hidden_size=6, num_attention_heads=3, num_key_value_heads=1, intermediate_size=11)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    wanted = (gate / (1 + torch.exp(-gate)) * up) @ mlp.down_proj.weight.T
    ours = mlp(x)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn_like(ours)
    parameters = (x, *mlp.parameters())
    pairs = zip(
        torch.autograd.grad(ours, parameters, upstream), torch.autograd.grad(wanted, parameters, upstream), strict=True
    )
    for gradient, reference in pairs:
        assert ((gradient - reference).norm() / reference.norm()).item() < 1e-12


def test_no_biases():
    mlp = MLP(ModelConfig.preset("demo"))
    assert [name for name, _ in mlp.named_parameters()] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert mlp.down_proj.weight.shape == (128, 384)
