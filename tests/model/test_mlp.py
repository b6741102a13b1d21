"""SwiGLU against its formula."""

import torch

from minillm.config import ModelConfig
from minillm.kernels.swiglu import swiglu
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


def test_gradients_of_the_product():
    gate, up = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    with torch.no_grad():
        gate[0] = torch.tensor([-800.0, 0.0, 800.0, -40.0])
    (gradient,) = torch.autograd.grad(swiglu(gate, up).sum(), gate)
    assert torch.isfinite(gradient).all()


def test_two_tensors_are_kept():
    gate, up = (torch.randn(3, 4).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert sorted(saved) == sorted([gate.data_ptr(), up.data_ptr()])
