"""Rotary embedding against complex numbers and transformers, and the property it exists for."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minillm.config import ModelConfig
from minillm.inference import generate
from minillm.model.rope import apply_rope, original_length, rope_frequencies, rope_tables

LENGTH = 300  # before the extension; enough for both of yarn's bounds to fall inside a head
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "llama3, other bounds": {"rope_type": "llama3", "factor": 2.0, **LLAMA3, "low_freq_factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH},
    "yarn without the length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, all settings": {
        "rope_type": "yarn", "factor": 5.5, "original_max_position_embeddings": LENGTH, "beta_fast": 6,
        "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False,
    },
    "yarn with half of mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    "yarn, given attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "beta_fast": 8},
    "yarn, plain bounds": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn of factor 1": {"rope_type": "yarn", "factor": 1.0},
}  # fmt: skip


@pytest.fixture(params=SCALINGS)
def scaling(request):
    return SCALINGS[request.param]


def config_of(head_dim=16, theta=1e4, scaling=None, partial=1.0, positions=LENGTH):
    """One head of ``head_dim``; the family that has partial turning also needs experts."""
    glm = {"num_experts": 2, "scoring_func": "sigmoid", "n_shared_experts": 1, "partial_rotary_factor": partial}
    return ModelConfig(
        vocab_size=11, hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
        rope_theta=theta, rope_scaling=scaling, max_position_embeddings=positions, **(glm if partial < 1 else {}),
    )  # fmt: skip


def by_complex_numbers(x, position_ids, frequencies, factor=1.0):
    """Pair i of a head, as the complex number x[i] + i·x[i + K/2], times factor·exp(i · position · frequency)."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])  # (B, T, H, K/2)
    angles = position_ids[..., None, None] * frequencies
    turned = pairs * torch.polar(torch.full_like(angles, factor), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def plain_frequencies(dim, theta):
    return torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)


def slow_frequencies(config, length):
    """Return frequencies and attention factor in float64, pair by pair, from the papers' formulas."""
    scaling, dim, theta = config.rope_scaling, config.rotary_dim, config.rope_theta
    kind, s = scaling["rope_type"], scaling["factor"]
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    found = []
    for i in range(dim // 2):
        plain = theta ** (-2 * i / dim)
        turns = original * plain / (2 * math.pi)
        if kind == "linear":
            found.append(plain / s)
        elif kind == "dynamic":
            longer = s * max(length, original) / original - (s - 1)
            found.append((theta * longer ** (dim / (dim - 2))) ** (-2 * i / dim))
        elif kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            if turns < low:
                found.append(plain / s)
            elif turns > high:
                found.append(plain)
            else:
                smooth = (turns - low) / (high - low)
                found.append((1 - smooth) * plain / s + smooth * plain)
        else:
            fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
            bounds = [dim / 2 * math.log(original / (2 * math.pi * beta), theta) for beta in (fast, slow)]
            if scaling.get("truncate", True):
                bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
            bounds = [max(bounds[0], 0), min(bounds[1], dim - 1)]
            ramp = min(1.0, max(0.0, (i - bounds[0]) / (bounds[1] - bounds[0])))
            found.append(plain * (1 - ramp) + plain / s * ramp)
    attention = 1.0
    if kind == "yarn":
        m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = 0.1 * math.log(s) + 1
        if m and m_all:
            attention = (0.1 * m * math.log(s) + 1) / (0.1 * m_all * math.log(s) + 1)
        attention = scaling.get("attention_factor", attention)
    return torch.tensor(found, dtype=torch.float64), attention


def rotate(x, position_ids, **options):
    return apply_rope(x, *rope_tables(position_ids, config_of(x.shape[-1], **options), dtype=x.dtype))


@pytest.mark.parametrize("head_dim", [2, 6, 64])
@pytest.mark.parametrize("theta", [10.0, 1e4, 1e6])
def test_equals_complex_multiplication(head_dim, theta):
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 5, 3, head_dim, dtype=torch.float64, generator=generator, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 31_000, 1, 2]])  # restarts and long ones
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours = rotate(x, positions, theta=theta)
    wanted = by_complex_numbers(x, positions, plain_frequencies(head_dim, theta))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)
    (ours,), (wanted,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(wanted, x, upstream)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)


def test_products_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)

    def product(m, n):
        return (rotate(q, torch.tensor([[m]])) * rotate(k, torch.tensor([[n]]))).sum().item()

    assert product(9, 4) == pytest.approx(product(1009, 1004), abs=1e-9)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_position_zero_changes_nothing_and_lengths_stay():
    x = torch.randn(1, 3, 2, 8, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, torch.tensor([[0, 5, 100]]))
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("partial", [1.0, 0.5, 0.75])
def test_gradcheck(partial):
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    options = {"partial": partial, "scaling": SCALINGS["yarn, all settings"]}  # an attention factor below 1
    assert torch.autograd.gradcheck(lambda x: rotate(x, torch.tensor([[0, 2, 9]]), **options), x)


def test_angles_are_at_least_float32():
    """At position 30,000 a bfloat16 angle would be off by whole turns."""
    positions, config = torch.tensor([[30_001]]), config_of(8)
    cos, sin = rope_tables(positions, config, dtype=torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    wide = rope_tables(positions, config, dtype=torch.float64)
    assert wide[0].dtype == torch.float64
    assert (cos - wide[0]).abs().max() < 5e-3  # float32 holds 30,001 rad to 2e-3
    x = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(3))
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


# ---- scaling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial, theta", [(1.0, 1e4), (0.5, 1e4), (1.0, 10.0)])
def test_frequencies_equal_transformers_and_the_formulas(scaling, partial, theta):
    config = config_of(24, scaling=scaling, partial=partial, theta=theta)
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    kind = theirs.rope_parameters["rope_type"]
    for length in (1, LENGTH, LENGTH + 1, 1000):
        positions = torch.arange(length)[None]
        wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=length)
        ours, factor = rope_frequencies(positions, config, dtype=torch.float32)
        assert factor == pytest.approx(wanted_factor, abs=1e-12)
        assert ours.dtype == torch.float32
        assert ours.shape == (config.rotary_dim // 2,)
        torch.testing.assert_close(ours, wanted, rtol=5e-7, atol=0)
        ours, factor = rope_frequencies(positions, config, dtype=torch.float64)
        wanted, wanted_factor = slow_frequencies(config, length)
        assert factor == pytest.approx(wanted_factor, abs=1e-12)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_tables_equal_transformers_while_the_sequence_grows(scaling, partial):
    """transformers' dynamic embedding remembers; in the order of a growing sequence that makes no difference."""
    config = config_of(24, scaling=scaling, partial=partial)
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    module = (LlamaRotaryEmbedding if partial == 1 else Glm4MoeRotaryEmbedding)(theirs)
    for last in (5, LENGTH, LENGTH + 1, 350, 450, 20):  # at last a short one, for which it begins anew
        positions = torch.arange(max(0, last - 9), last)[None]
        cos, sin = rope_tables(positions, config, dtype=torch.float32)
        for ours, wanted in zip((cos, sin), module(torch.zeros(1), positions), strict=True):
            twice = torch.cat([ours, ours], dim=-1)[:, :, 0]  # theirs: both numbers of a pair have an entry
            # float32 holds an angle of 450 rad to 1.5e-5
            torch.testing.assert_close(twice, wanted, rtol=0, atol=5e-5)


def test_scaling_in_float64_turns_and_scales(scaling):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 2, 16, dtype=torch.float64, generator=generator)
    positions = torch.tensor([[0, 1, 90], [3, 451, 2]])
    frequencies, factor = slow_frequencies(config_of(16, scaling=scaling), 452)
    wanted = by_complex_numbers(x, positions, frequencies, factor)
    torch.testing.assert_close(rotate(x, positions, scaling=scaling), wanted, rtol=0, atol=1e-11)


def test_dynamic_changes_nothing_up_to_the_original_length_and_forgets():
    config = config_of(scaling=SCALINGS["dynamic"])
    plain, before = (rope_tables(torch.arange(LENGTH)[None], c, dtype=torch.float64) for c in (config_of(), config))
    torch.testing.assert_close(before, plain, rtol=0, atol=1e-12)
    longer = rope_tables(torch.arange(LENGTH + 20)[None], config, dtype=torch.float64)
    assert (longer[0][:, :LENGTH] - plain[0]).abs().max() > 0.01
    again = rope_tables(torch.arange(LENGTH)[None], config, dtype=torch.float64)
    assert torch.equal(again[0], before[0])


def test_dynamic_with_an_original_length_of_its_own():
    short = config_of(scaling={"rope_type": "dynamic", "factor": 2.0}, positions=20)
    long = config_of(
        scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20}, positions=40
    )
    positions = torch.arange(33)[None]
    ours, wanted = (rope_frequencies(positions, c, dtype=torch.float64)[0] for c in (long, short))
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_head_of_one_pair(name):
    """Its frequency is 1 before scaling; dynamic's power would divide by zero."""
    config = config_of(2, scaling=SCALINGS[name])
    frequencies, _ = rope_frequencies(torch.arange(400)[None], config, dtype=torch.float64)
    assert frequencies.shape == (1,)
    assert 0 < frequencies.item() <= 1


def test_the_original_length():
    assert original_length(config_of()) == LENGTH
    assert original_length(config_of(scaling=SCALINGS["linear"])) == 100
    assert original_length(config_of(scaling=SCALINGS["dynamic"])) == LENGTH
    assert original_length(config_of(scaling=SCALINGS["yarn"], positions=4 * LENGTH)) == LENGTH
    assert original_length(config_of(scaling=SCALINGS["yarn without the length"])) == LENGTH


WITHIN_12 = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 12},
    {"rope_type": "llama3", "factor": 4.0, **LLAMA3, "original_max_position_embeddings": 12},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12},
]


@pytest.mark.parametrize("scaling", WITHIN_12, ids=lambda scaling: scaling["rope_type"])
def test_logits_and_greedy_text_equal_transformers_past_the_original_length(tools, scaling):
    """Token by token dynamic's cached keys keep the angles of the length at which they came, here and there."""
    model = tools.model(tools.config(rope_scaling=scaling, max_position_embeddings=48)).eval()
    reference = tools.reference(model).eval()
    for length in (7, 12, 13, 40):
        ids = tools.tokens(2, length, seed=length)
        with torch.no_grad():
            assert tools.difference(model(ids), reference(ids).logits) <= 1e-5
    ids = tools.tokens(1, 5)
    wanted = reference.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generate(model, ids.tolist(), max_new_tokens=30, temperature=0) == [wanted[0, 5:].tolist()]


# ---- only a part of the head -----------------------------------------------------------------------


@pytest.mark.parametrize("partial", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_of_the_head_equals_glm(partial, dtype):
    """Padding, restarts, and a tensor that is not contiguous, as attention makes none but may one day."""
    config = config_of(24, partial=partial)
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(2, 3, 5, 24, generator=generator).to(dtype).transpose(1, 2)  # (B, T, H, K)
    positions = torch.tensor([[0, 1, 2, 0, 1], [9, 10, 11, 12, 13]])
    cos, sin = rope_tables(positions, config, dtype=dtype)
    assert cos.shape == (2, 5, 1, config.rotary_dim // 2)
    theirs = Glm4MoeRotaryEmbedding(transformers.AutoConfig.for_model(**config.to_hf()))
    wanted, _ = apply_rotary_pos_emb(q.float(), q.float(), *theirs(torch.zeros(1), positions), unsqueeze_dim=2)
    ours = apply_rope(q, cos, sin)
    torch.testing.assert_close(ours, wanted.to(dtype), rtol=1e-5, atol=2e-6)
    assert torch.equal(ours[..., config.rotary_dim :], q[..., config.rotary_dim :])
    assert not torch.equal(ours[..., : config.rotary_dim], q[..., : config.rotary_dim])
