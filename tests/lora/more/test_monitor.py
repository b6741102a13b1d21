"""The monitor: every figure against the slow obvious formula, every warning where it belongs and only there."""

import math

import pytest
import torch

from minillm.config import ModelConfig
from minillm.lora import apply_lora, lora_parameters
from minillm.lora.core import adapted_layers
from minillm.lora.more.layers import ResidualLoRA
from minillm.lora.more.monitor import Monitor, effective_rank, singular_values
from minillm.model import Transformer

CONFIG = ModelConfig(
    vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40,
)  # fmt: skip
VARIANTS = {
    "lora": {},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora", "use_rslora": True},
    "orthogonal": {"init": "orthogonal", "rank_pattern": {"down_proj": 7}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": "embed_tokens,q_proj"},
}


def adapted(**settings):
    torch.manual_seed(0)
    model = Transformer(CONFIG).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    before = {name: module.weight.clone() for name, module in model.named_modules() if hasattr(module, "weight")}
    apply_lora(model, generator=torch.Generator().manual_seed(1), **({"rank": 3, "alpha": 5.0} | settings))
    return model, before


def backward(model, step):
    ids = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(step))
    model(ids).square().mean().backward()


def train(model, monitor, n_steps, lr=1e-2, **options):
    """Return the rows of ``n_steps`` AdamW steps."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=lr, weight_decay=0.0, **options)
    rows = []
    for step in range(1, n_steps + 1):
        optimizer.zero_grad()
        backward(model, step)
        monitor.before_update(step)
        optimizer.step()
        rows.append(monitor.after_update(step, optimizer))
    return [row for row in rows if row is not None]


def kept(model):
    return {name: (x.lora.A.weight.detach().clone(), x.lora.B.weight.detach().clone())
            for name, x in adapted_layers(model).items()}  # fmt: skip


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-12)  # figures are rounded to six digits


@pytest.mark.parametrize("name", VARIANTS)
def test_figures_are_those_of_the_whole_matrices(name):
    model, before = adapted(**VARIANTS[name])
    monitor = Monitor(model, interval=1)
    train(model, monitor, 3)
    old = kept(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    optimizer.zero_grad()
    backward(model, 4)
    layers = adapted_layers(model)
    gradients = {n: [m.weight.grad.norm().item() for m in (x.lora.A, x.lora.B)] for n, x in layers.items()}
    monitor.before_update(4)
    optimizer.step()
    rows = monitor.after_update(4, optimizer)["layers"]
    assert list(rows) == list(adapted_layers(model))
    for layer_name, layer in adapted_layers(model).items():
        row, lora, weight = rows[layer_name], layer.lora, before[layer_name]
        (a0, b0), a, b = old[layer_name], lora.A.weight, lora.B.weight
        s = lora.scaling
        assert [row["grad_norm_A"], row["grad_norm_B"]] == pytest.approx(gradients[layer_name], rel=1e-5)
        assert close(row["grad_ratio"], gradients[layer_name][1] / gradients[layer_name][0])
        change = s * (b @ a)
        if isinstance(lora, ResidualLoRA):
            change = change - s * (lora.initial[1] @ lora.initial[0])
        if name == "dora":  # all that it does, the lengths of the rows included
            turned = weight + change
            whole = (lora.magnitude / turned.norm(dim=1))[:, None] * turned - weight
        else:
            whole = change
        assert close(row["delta_ratio"], (whole.norm() / weight.norm()).item())
        assert close(row["update_ratio"], ((s * (b @ a - b0 @ a0)).norm() / weight.norm()).item())
        assert close(row["update_ratio_A"], ((a - a0).norm() / a0.norm()).item())
        assert close(row["update_ratio_B"], ((b - b0).norm() / b0.norm()).item())
        p = torch.linalg.svdvals(change)
        p = p[p > 1e-9 * p.max()] / p.sum()
        assert close(row["effective_rank"], (-(p * p.log()).sum()).exp().item())


def test_adamw_figures_are_those_of_its_state():
    model, _ = adapted()
    monitor = Monitor(model, interval=1)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, betas=(0.7, 0.9), eps=3e-4, weight_decay=0.0)
    for step in range(1, 5):
        optimizer.zero_grad()
        backward(model, step)
        monitor.before_update(step)
        old = kept(model)
        optimizer.step()
        row = monitor.after_update(step, optimizer)["layers"]
    shares = []
    for name, layer in adapted_layers(model).items():
        for key, matrix, was in zip("AB", (layer.lora.A.weight, layer.lora.B.weight), old[name], strict=True):
            state = optimizer.state[matrix]
            assert close(row[name][f"adam_mean_{key}"], state["exp_avg"].square().mean().sqrt().item())
            assert close(row[name][f"adam_rms_{key}"], state["exp_avg_sq"].mean().sqrt().item())
            # The mean step in learning rates, seen from outside: what has moved.
            assert close(row[name][f"adam_step_{key}"], ((matrix - was).abs().mean() / 1e-2).item())
            corrected = (state["exp_avg_sq"] / (1 - 0.9**4)).sqrt()
            shares.append(row[name][f"adam_eps_{key}"])
            assert close(shares[-1], (corrected < 3e-4).double().mean().item())
    assert any(0 < share < 1 for share in shares)


def test_other_optimizers_have_no_such_figures():
    model, _ = adapted()
    monitor = Monitor(model)
    backward(model, 1)
    monitor.before_update(1)
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.1)
    optimizer.step()
    row = next(iter(monitor.after_update(1, optimizer)["layers"].values()))
    assert row["adam_rms_A"] is row["adam_step_B"] is None
    assert row["update_ratio"] > 0


def test_zero_b_gives_a_no_gradient_at_first():
    model, _ = adapted()
    monitor = Monitor(model, interval=1)
    first, second = train(model, monitor, 2)
    for row in first["layers"].values():
        assert row["grad_norm_A"] == 0.0
        assert row["grad_ratio"] is None
        assert row["grad_norm_B"] > 0
        assert row["update_ratio_A"] == 0.0
        assert row["update_ratio_B"] is None
    assert all(row["grad_norm_A"] > 0 for row in second["layers"].values())


def test_checks_the_first_step_and_then_at_intervals():
    model, _ = adapted()
    assert [row["step"] for row in train(model, Monitor(model, interval=4), 10)] == [1, 4, 8]


def test_a_skipped_update_is_not_checked():
    """float16: the scaler leaves a step out, and the next one has other gradients."""
    model, _ = adapted()
    monitor = Monitor(model, interval=2)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    backward(model, 1)
    monitor.before_update(2)
    monitor.before_update(3)
    optimizer.step()
    assert monitor.after_update(3, optimizer) is None


def test_numbers_that_are_not_finite_raise_no_error():
    """The run itself stops for them with a message; its monitor must not fail first."""
    model, _ = adapted()
    monitor = Monitor(model, interval=1)
    train(model, monitor, 1)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    backward(model, 2)
    next(lora_parameters(model)).grad.fill_(float("nan"))
    monitor.before_update(2)
    optimizer.step()
    row = monitor.after_update(2, optimizer)
    assert sum(math.isnan(layer["delta_ratio"]) for layer in row["layers"].values()) == 1
    assert any("not finite in model.layers.0.self_attn.q_proj" in warning for warning in row["warnings"])
    assert monitor.notes() == ["the adapter is no longer finite: use a checkpoint from before"]


# ---- warnings ----------------------------------------------------------------------------------------------------


def warnings(rows):
    return [(row["step"], text) for row in rows for text in row["warnings"]]


def test_a_sound_run_gives_no_warning():
    model, _ = adapted()
    assert warnings(train(model, Monitor(model, interval=5), 60, lr=1e-4)) == []


def test_says_that_b_stays_zero():
    model, _ = adapted(target_modules="q_proj")
    monitor = Monitor(model, interval=10)
    optimizer = torch.optim.AdamW([x.lora.A.weight for x in adapted_layers(model).values()], lr=1e-2)  # B is forgotten
    rows = []
    for step in range(1, 81):
        backward(model, step)
        monitor.before_update(step)
        optimizer.step()
        rows.append(monitor.after_update(step, optimizer))
    ((step, text),) = warnings(row for row in rows if row)
    assert step == 50
    assert text.startswith("A has received no gradient for 50 steps in model.layers.0.self_attn.q_proj and 1 more")
    assert "B is still zero" in text


def test_says_that_a_layer_is_not_reached():
    model, _ = adapted(target_modules="q_proj,down_proj")
    layers = adapted_layers(model)
    dead = layers["model.layers.1.mlp.down_proj"].lora
    dead.requires_grad_(False)
    rows = train(model, Monitor(model, interval=5), 60, lr=1e-4)
    ((step, text),) = warnings(rows)
    assert step == 50
    assert "no gradient for 50 steps in model.layers.1.mlp.down_proj: the loss does not depend" in text


def test_says_that_steps_are_too_large():
    model, _ = adapted()
    rows = train(model, Monitor(model, interval=1), 12, lr=0.1)
    found = {text.split(" in ")[0][:12]: (step, text) for step, text in warnings(rows)}
    step, text = found["update ratio"]
    assert step == 3
    assert "lower the learning rate" in text
    worst = max(row["update_ratio"] for row in rows[2]["layers"].values())
    assert f"update ratio {worst:.1g} in " in text
    assert any("of the weight in" in text and "written over" in text for _, text in warnings(rows))
    assert len(warnings(rows)) == len({text[:12] for _, text in warnings(rows)})  # each once


def test_says_that_a_hardly_learns():
    model, _ = adapted()
    monitor = Monitor(model, interval=1)
    rows = train(model, monitor, 60, lr=1e-7)
    (found,) = [(step, text) for step, text in warnings(rows) if "times A's" in text]
    assert 50 <= found[0] <= 52


def test_says_that_eps_swallows_the_steps():
    model, _ = adapted()
    rows = train(model, Monitor(model, interval=1), 5, lr=1e-4, eps=1.0)
    ((step, text),) = warnings(rows)
    assert step == 3
    assert text.startswith("AdamW's eps is larger than most gradients in ")


def test_warnings_go_on_after_an_interruption():
    model, _ = adapted()
    whole = train(model, Monitor(model, interval=1), 60, lr=1e-7)
    model, _ = adapted()
    first = Monitor(model, interval=1)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-7, weight_decay=0.0)
    rows, monitor = [], first
    for step in range(1, 61):
        if step == 31:
            monitor = Monitor(model, interval=1)
            monitor.load_state(first.state())
        optimizer.zero_grad()
        backward(model, step)
        monitor.before_update(step)
        optimizer.step()
        rows.append(monitor.after_update(step, optimizer))
    assert rows == whole
    assert warnings(whole)


# ---- at the end --------------------------------------------------------------------------------------------------


def test_notes_tell_an_adapter_that_learnt_nothing():
    model, _ = adapted()
    monitor = Monitor(model)
    assert monitor.notes() == []
    train(model, monitor, 5, lr=1e-8)
    assert "hardly learnt" in monitor.notes()[1]


def test_notes_tell_whether_the_rank_is_used():
    model, _ = adapted(rank=8)
    monitor = Monitor(model)
    train(model, monitor, 1)
    for row in monitor.last_row["layers"].values():
        row |= {"effective_rank": 1.5, "delta_ratio": 0.1}
    assert monitor.notes() == [
        "median over layers: |dW|/|W| 0.1, effective rank 1.5 of 8",
        "most layers use less than a quarter of rank 8: a smaller one will probably do",
    ]
    for row in monitor.last_row["layers"].values():
        row["effective_rank"] = 7.8
    assert monitor.notes()[1] == "most layers use all of rank 8: a larger one may learn more"


def test_effective_rank_of_known_products():
    b, a = torch.eye(9)[:, :4], torch.eye(4, 11)
    assert effective_rank(singular_values(b.T @ b, a @ a.T)) == pytest.approx(4.0)
    a = torch.zeros(4, 11)
    assert effective_rank(singular_values(b.T @ b, a @ a.T)) == 0.0
    a = torch.ones(4, 11)
    assert effective_rank(singular_values(b.T @ b, a @ a.T)) == pytest.approx(1.0)
