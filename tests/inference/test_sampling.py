"""Sampling against transformers' own processors, and against counting."""

import math

import pytest
import torch

from minillm.errors import UserError
from minillm.inference.sampling import (
    SamplingOptions,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process_logits,
    row_uniforms,
    sample,
)


def random_logits(rows=6, vocab=97, seed=0):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def seen_mask(ids, vocab):
    return torch.zeros(ids.shape[0], vocab, dtype=torch.bool).scatter_(1, ids, True)


@pytest.mark.parametrize("k", [1, 2, 50, 97, 1000])
def test_top_k_equals_transformers(k):
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = random_logits()
    logits[0, :10] = logits[0, 0]  # ties
    assert torch.equal(keep_top_k(logits, k), processors.TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.85, 0.999])
def test_top_p_equals_transformers(p):
    processors = pytest.importorskip("transformers").generation.logits_process
    for seed in range(5):
        logits = random_logits(seed=seed)
        assert torch.equal(keep_top_p(logits, p), processors.TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.3, 0.6, 0.9])
def test_top_p_is_the_smallest_set_that_reaches_p(p):
    for row in random_logits(rows=20):
        kept = keep_top_p(row[None], p)[0].isfinite()
        probabilities = row.double().softmax(0)
        chosen = probabilities[kept]
        assert chosen.sum() >= p - 1e-6
        assert chosen.sum() - chosen.min() < p + 1e-6  # one fewer would not reach it
        assert chosen.min() >= probabilities[~kept].max()


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_equals_transformers(min_p):
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = random_logits()
    assert torch.equal(keep_min_p(logits, min_p), processors.MinPLogitsWarper(min_p)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(penalty):
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = random_logits()
    ids = torch.randint(97, (6, 40), generator=torch.Generator().manual_seed(1))  # with repeats
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, seen_mask(ids, 97), penalty), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.85, "top_k": 30, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2},
        {"top_p": 0.5, "min_p": 0.4, "repetition_penalty": 0.8},
    ],
)
def test_whole_chain_equals_the_list_transformers_builds(options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    generation = transformers.GenerationConfig(do_sample=True, **{"top_k": 0, **options})
    chain = model._get_logits_processor(generation_config=generation, input_ids_seq_length=4)
    ids = torch.randint(97, (6, 40), generator=torch.Generator().manual_seed(1))
    logits = random_logits()
    ours = process_logits(logits, SamplingOptions(**options), seen_mask(ids, 97))
    assert torch.equal(ours, chain(ids, logits.clone()))


def test_greedy_takes_the_penalised_maximum_and_ignores_the_rest():
    logits = torch.tensor([[3.0, 2.9, 0.0], [-1.0, -1.1, -2.0]])
    seen = torch.tensor([[True, False, False], [True, False, False]])
    assert sample(logits, SamplingOptions(temperature=0)).tolist() == [0, 0]
    options = SamplingOptions(temperature=0, top_k=1, top_p=0.1, repetition_penalty=1.2)
    assert sample(logits, options, seen=seen).tolist() == [1, 1]
    assert SamplingOptions(temperature=1e-9).greedy


def test_draw_follows_the_distribution_and_never_takes_a_cut_token():
    logits = torch.tensor([[0.0, -math.inf, 1.0, -0.5, -math.inf]])
    n = 20_000
    uniform = row_uniforms(1, n, torch.Generator().manual_seed(0))[0]
    tokens = draw(logits.expand(n, -1), uniform)
    shares = torch.bincount(tokens, minlength=5) / n
    # The standard deviation of a share is below 0.004: five of them.
    assert (shares - logits.softmax(-1)[0]).abs().max() < 0.02
    assert shares[1] == shares[4] == 0


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-53])
def test_draw_at_the_edges_of_the_unit_interval(edge):
    logits = torch.full((4, 33), -math.inf)
    logits[:, 5], logits[:, 20] = 0.3, 0.7
    tokens = draw(logits, torch.full((4,), edge, dtype=torch.float64))
    assert tokens.tolist() == [5 if edge == 0 else 20] * 4


def test_draw_does_not_depend_on_companions():
    logits = random_logits(rows=8)
    uniform = row_uniforms(8, 1, torch.Generator().manual_seed(3))[:, 0]
    together = draw(logits, uniform)
    alone = torch.cat([draw(logits[i : i + 1], uniform[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)


def test_row_uniforms_are_seeded_per_row_and_stable_in_length():
    def fresh():
        return torch.Generator().manual_seed(7)

    whole = row_uniforms(3, 40, fresh())
    assert torch.equal(whole, row_uniforms(3, 40, fresh()))
    assert torch.equal(whole[:, :5], row_uniforms(3, 5, fresh()))
    shared = fresh()
    assert torch.equal(whole, torch.cat([row_uniforms(1, 40, shared), row_uniforms(2, 40, shared)]))
    assert ((whole >= 0) & (whole < 1)).all()
    assert not torch.equal(whole[0], whole[1])


def test_low_precision_logits_are_processed_in_float32_and_float64_stays():
    options = SamplingOptions(temperature=0.5, top_p=0.9)
    assert process_logits(random_logits().bfloat16(), options).dtype == torch.float32
    assert process_logits(random_logits().double(), options).dtype == torch.float64


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
     {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 1e-300}, {"temperature": 1e300}],
)  # fmt: skip
def test_bad_options_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingOptions(**bad)
