"""The mixture of experts against a loop over tokens and experts, and against transformers' modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Glm4MoeConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model import moe as module
from minillm.model.mlp import MLP
from minillm.model.moe import MoE, Routing, update_router_bias

TINY = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 64, "rope_theta": 1e4,
}  # fmt: skip
SIGMOID = {"scoring_func": "sigmoid", "n_shared_experts": 1}
ROUTINGS = {
    "softmax, normalised": {"num_experts": 5, "num_experts_per_tok": 2},
    "softmax, as it is": {
        "num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 18, "norm_topk_prob": False,
        "use_qk_norm": True,
    },
    "softmax, 2 shared": {"num_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 2},
    "softmax, gated shared": {
        "num_experts": 5, "num_experts_per_tok": 1, "norm_topk_prob": False, "moe_intermediate_size": 18,
        "n_shared_experts": 1, "shared_expert_gate": True, "shared_expert_intermediate_size": 13,
    },
    "sigmoid, 2 shared": SIGMOID | {
        "num_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 11,
    },
    "2 of 4 groups": SIGMOID | {
        "num_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": False,
        "routed_scaling_factor": 1.5, "moe_intermediate_size": 10,
    },
}  # fmt: skip
LENGTHS = [7, 3, 0, 1]  # tokens in rows of 7: ragged, one row all padding


@pytest.fixture(params=ROUTINGS)
def routing_name(request):
    return request.param


def make_config(name="softmax, normalised", **changes):
    return ModelConfig(**(TINY | ROUTINGS[name] | changes))


@torch.no_grad()
def fill(network, *, seed=0, dtype=torch.float64):
    """Draw weights, and correction biases, so large that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(noise * 0.3 if tensor.ndim > 1 or name.endswith("bias") else 1 + 0.3 * noise)
    return network.to(dtype)


def make_moe(name="softmax, normalised", *, dtype=torch.float64, **changes):
    config = make_config(name, **changes)
    return fill(MoE(config, 0), dtype=dtype), config


def make_x(*sizes, dtype=torch.float64, seed=1):
    return torch.randn(*sizes, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mask(lengths=LENGTHS, seq_len=7):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


def slow_moe(moe, config, x, is_token):
    """One token and one expert at a time."""
    out = []
    for token, real in zip(x.reshape(-1, x.shape[-1]), is_token.flatten().tolist(), strict=True):
        y = torch.zeros_like(token)
        logits = moe.gate.weight @ token
        if config.scoring_func == "softmax":
            scores = logits.exp() / logits.exp().sum()
            merits = scores.tolist()
        else:
            scores = 1 / (1 + torch.exp(-logits))
            merits = (scores + moe.gate.e_score_correction_bias).tolist()
        size = config.num_experts // config.n_group
        groups = [range(start, start + size) for start in range(0, config.num_experts, size)]
        groups.sort(key=lambda group: -sum(sorted((merits[e] for e in group), reverse=True)[:2]))
        allowed = [e for group in groups[: config.topk_group] for e in group]
        chosen = sorted(allowed, key=lambda e: -merits[e])[: config.num_experts_per_tok]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
        for e in chosen if real else []:
            gate, up = (moe.experts.gate_up_proj[e] @ token).chunk(2)
            y = y + config.routed_scaling_factor * scores[e] / total * (moe.experts.down_proj[e] @ (F.silu(gate) * up))
        if (shared := moe.shared_experts or moe.shared_expert) is not None:
            gated = moe.shared_expert_gate is not None
            share = 1 / (1 + torch.exp(-(moe.shared_expert_gate.weight @ token))) if gated else 1.0
            y = y + share * shared(token)
        out.append(y)
    return torch.stack(out).view(x.shape)


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-300))


def check_same(ours, wanted, inputs, bound, reference_inputs=None):
    """Compare two results and their gradients with respect to ``inputs``."""
    assert distance(ours, wanted) <= bound
    upstream = make_x(*ours.shape[:-1], dtype=ours.dtype, seed=5)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    for ours_g, wanted_g in zip(
        gradients, torch.autograd.grad(wanted, reference_inputs or inputs, upstream), strict=True
    ):
        assert distance(ours_g, wanted_g) <= bound


def test_equals_the_loop_with_padding(routing_name):
    moe, config = make_moe(routing_name)
    x = make_x(4, 7).requires_grad_()
    ours = moe(x, Routing(mask()))
    check_same(ours, slow_moe(moe, config, x, mask()), [x, *moe.parameters()], 1e-12)
    if not config.n_shared_experts:
        assert (ours[~mask()] == 0).all()


def test_equals_the_loop_without_padding(routing_name):
    moe, config = make_moe(routing_name)
    for sizes in ((2, 5), (1, 1)):
        x = make_x(*sizes).requires_grad_()
        wanted = slow_moe(moe, config, x, torch.ones(sizes, dtype=torch.bool))
        check_same(moe(x), wanted, [x, *moe.parameters()], 1e-12)
        assert torch.equal(moe(x), moe(x, Routing(torch.ones(sizes, dtype=torch.bool))))


@pytest.mark.parametrize("k", range(1, 8))
def test_any_number_of_experts_per_token(k):
    moe, config = make_moe("softmax, as it is", num_experts_per_tok=k)
    x = make_x(4, 7).requires_grad_()
    check_same(moe(x, Routing(mask())), slow_moe(moe, config, x, mask()), [x, *moe.parameters()], 1e-12)


def test_all_experts_alike_are_one_dense_layer():
    """Weights that sum to 1 over copies of one layer give that layer, whatever the router chooses."""
    moe, config = make_moe()
    dense = fill(MLP(config))
    with torch.no_grad():
        moe.experts.gate_up_proj.copy_(torch.cat([dense.gate_proj.weight, dense.up_proj.weight]))
        moe.experts.down_proj.copy_(dense.down_proj.weight)
    assert distance(moe(make_x(3, 5)), dense(make_x(3, 5))) <= 1e-14


def theirs(name, config):
    """Return transformers' module of the same routing."""
    common = {
        "hidden_size": 24, "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": config.norm_topk_prob,
    }  # fmt: skip
    if config.scoring_func == "sigmoid":
        values, kind = Glm4MoeConfig(
            **common, n_routed_experts=config.num_experts, n_shared_experts=config.n_shared_experts,
            n_group=config.n_group, topk_group=config.topk_group, routed_scaling_factor=config.routed_scaling_factor,
        ), Glm4MoeMoE  # fmt: skip
    elif name == "mixtral":
        common["intermediate_size"] = config.moe_intermediate_size
        values, kind = MixtralConfig(**common, num_local_experts=config.num_experts), MixtralSparseMoeBlock
    elif config.n_shared_experts:
        width = config.shared_expert_intermediate_size
        values = Qwen2MoeConfig(**common, num_experts=config.num_experts, shared_expert_intermediate_size=width)
        kind = Qwen2MoeSparseMoeBlock
    else:
        values, kind = Qwen3MoeConfig(**common, num_experts=config.num_experts), Qwen3MoeSparseMoeBlock
    values._experts_implementation = "eager"
    return kind(values)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("mixtral", {}),
        ("softmax, normalised", {}),
        ("softmax, normalised", {"num_experts_per_tok": 1}),
        ("softmax, as it is", {}),
        ("softmax, as it is", {"num_experts_per_tok": 1}),
        ("softmax, gated shared", {}),
        ("softmax, gated shared", {"num_experts_per_tok": 3, "norm_topk_prob": True}),
        ("sigmoid, 2 shared", {}),
        ("sigmoid, 2 shared", {"num_experts_per_tok": 1}),
        ("2 of 4 groups", {}),
        ("2 of 4 groups", {"norm_topk_prob": True}),
    ],
)
def test_equals_transformers(name, changes):
    moe, config = make_moe("softmax, normalised" if name == "mixtral" else name, dtype=torch.float32, **changes)
    reference = theirs(name, config)
    reference.load_state_dict(moe.state_dict())  # the same names and shapes
    x = make_x(3, 9, dtype=torch.float32).requires_grad_()
    learns = not (config.num_experts_per_tok == 1 and config.norm_topk_prob)
    ours, wanted = ({n: p for n, p in m.named_parameters() if learns or n != "gate.weight"} for m in (moe, reference))
    check_same(moe(x), reference(x), [x, *ours.values()], 2e-6, reference_inputs=[x, *(wanted[name] for name in ours)])


def test_idle_experts_get_a_zero_gradient():
    """None would make DDP wait for the parameter forever."""
    moe, _ = make_moe("softmax, as it is")
    moe(make_x(1, 1)).sum().backward()
    used = [bool(gradient.abs().sum() > 0) for gradient in moe.experts.down_proj.grad]
    assert sum(used) == 3
    assert [bool(gradient.abs().sum() > 0) for gradient in moe.experts.gate_up_proj.grad] == used


def test_nothing_but_padding(routing_name):
    moe, _ = make_moe(routing_name)
    x = make_x(2, 3).requires_grad_()
    out = moe(x, Routing(torch.zeros(2, 3, dtype=torch.bool)))
    out.sum().backward()
    shared = moe._shared(x)
    assert distance(out, 0 * out if shared is None else shared) == 0
    for parameter in (moe.gate.weight, *moe.experts.parameters()):
        assert (parameter.grad == 0).all()


def test_padding_meets_no_expert():
    """Were padding routed, infinite rows would turn every gradient into NaN."""
    moe, _ = make_moe()
    x = make_x(4, 7)
    wanted = moe(x, Routing(mask()))
    is_token = mask()
    loud = torch.where(is_token[..., None], x, torch.inf)
    torch.testing.assert_close(moe(loud, Routing(is_token))[is_token], wanted[is_token], rtol=0, atol=0)


def poisoned(x, matrices, *, offs):
    """Like torch's kernel, with NaN where it leaves results and gradients uninitialised."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, matrices):
            ctx.save_for_backward(x, matrices)
            out = x.new_full((len(x), matrices.shape[2]), torch.nan)
            for e, (start, end) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
                out[start:end] = x[start:end] @ matrices[e]
            return out

        @staticmethod
        def backward(ctx, grad):
            x, matrices = ctx.saved_tensors
            grad_x, grad_m = torch.full_like(x, torch.nan), torch.zeros_like(matrices)
            for e, (start, end) in enumerate(zip([0, *offs.tolist()], offs.tolist(), strict=False)):
                grad_x[start:end] = grad[start:end] @ matrices[e].T
                grad_m[e] = x[start:end].T @ grad[start:end]
            return grad_x, grad_m

    return Product.apply(x, matrices)


@pytest.mark.parametrize("kernel", ["torch", "poisoned"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_grouped_kernel_equals_the_blocks(monkeypatch, kernel, padded, dtype):
    """The way of GPUs, made to run here."""
    if kernel == "torch" and module.GROUPED_MM is None:
        pytest.skip("this torch has no grouped_mm")
    moe, _ = make_moe("sigmoid, 2 shared", moe_intermediate_size=16, dtype=dtype)
    x = make_x(4, 7, dtype=dtype).requires_grad_()
    routing = Routing(mask() if padded else None)
    wanted = moe(x, routing)
    real, calls = module.GROUPED_MM if kernel == "torch" else poisoned, []
    monkeypatch.setattr(module, "GROUPED_MM", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(module, "GROUPED_DEVICES", ("cpu",))
    # Both multiply in the same dtype, but not in the same order of sums.
    check_same(moe(x, routing), wanted, [x, *moe.parameters()], 2e-6 if dtype == torch.float32 else 1e-2)
    assert len(calls) == 2
    moe.double()(x.double(), routing)  # which the kernel does not have
    assert len(calls) == 2


@pytest.mark.parametrize("width, n_calls", [(9, 0), (12, 1), (16, 2)])
def test_odd_widths_do_without_the_kernel(monkeypatch, width, n_calls):
    calls = []
    monkeypatch.setattr(module, "GROUPED_MM", lambda *a, **k: calls.append(1) or poisoned(*a, **k))
    monkeypatch.setattr(module, "GROUPED_DEVICES", ("cpu",))
    moe, _ = make_moe("sigmoid, 2 shared", moe_intermediate_size=width, dtype=torch.float32)
    moe(make_x(4, 7, dtype=torch.float32))
    assert len(calls) == n_calls


def test_under_autocast():
    """The experts multiply in bfloat16; the router decides as in float32."""
    moe, _ = make_moe("sigmoid, 2 shared", dtype=torch.float32)
    x = make_x(3, 9, dtype=torch.float32).requires_grad_()
    wanted, routed = moe(x), moe.gate(x.flatten(0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = moe(x)
        for short, full in zip(moe.gate(x.flatten(0, 1)), routed, strict=True):
            assert torch.equal(short, full)
    assert ours.dtype == torch.bfloat16
    assert 0 < distance(ours.float(), wanted) < 0.02  # bfloat16 has 8 bits
    ours.float().sum().backward()
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


def test_bfloat16_keeps_router_and_bias_wide():
    moe, _ = make_moe("sigmoid, 2 shared", dtype=torch.float32)
    bias = moe.gate.e_score_correction_bias.clone()
    wanted = moe(make_x(3, 9, dtype=torch.float32)).detach()
    short = copy.deepcopy(moe).bfloat16()
    assert short.gate.weight.dtype == torch.bfloat16
    assert torch.equal(short.gate.e_score_correction_bias, bias)
    assert {t.dtype for t in short.gate(make_x(9, dtype=torch.bfloat16))} == {torch.float32, torch.int64}
    x = make_x(3, 9, dtype=torch.bfloat16)
    out = short(x).detach()
    assert out.dtype == torch.bfloat16
    # Rounding the weights to 8 bits may change a choice of experts here and there: half of the tokens must be close.
    errors = (out.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(errors.median()) < 0.02
    assert moe.double().gate.e_score_correction_bias.dtype == torch.float64
    assert moe.bfloat16().gate.e_score_correction_bias.dtype == torch.float32


def test_bias_update():
    model = fill(Transformer(make_config("sigmoid, 2 shared", first_k_dense_replace=1)))
    biases = [block.mlp.gate.e_score_correction_bias for block in model.model.layers[1:]]
    before = [bias.clone() for bias in biases]
    counts = torch.tensor([[10, 0, 5, 5, 5, 5], [2, 2, 2, 2, 2, 2]], dtype=torch.float64)
    update_router_bias(model, counts, 0.01)
    torch.testing.assert_close(biases[0], before[0] + torch.tensor([-0.01, 0.01, 0, 0, 0, 0]).double())
    assert torch.equal(biases[1], before[1])
    with pytest.raises(ValueError, match="zip"):
        update_router_bias(model, counts[:1], 0.01)


def test_bias_update_balances():
    """Tokens that all prefer the same experts are spread by the bias alone."""
    config = make_config("sigmoid, 2 shared")
    moe = fill(MoE(config, 0))
    moe.gate.e_score_correction_bias.zero_()
    with torch.no_grad():
        moe.gate.weight[0] = 1.0
    x = make_x(1, 200) + 1
    loads = []
    for _ in range(200):
        chosen = moe.gate(x.flatten(0, 1))[2]
        loads.append(torch.bincount(chosen.flatten(), minlength=6).double())
        update_router_bias(moe, loads[-1][None], 0.01)
    assert loads[0].max() > 2.5 * loads[0].mean()
    assert loads[-1].max() < 1.3 * loads[-1].mean()
