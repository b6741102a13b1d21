"""Speculation: which distribution the kept and drawn tokens follow, and what is guessed."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.inference import SamplingOptions
from minillm.inference.answer import Answer, next_logits
from minillm.model import Transformer
from minillm.serving import DraftModel, Engine, PromptLookup
from minillm.serving.request import Request
from minillm.serving.speculate import Draft, check_draft, n_uniforms

V = 6


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Return the statistic over the cells that can occur; no count may lie in another."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    return float(((counts - expected) ** 2 / expected)[expected > 0].sum())


def answer_with(uniforms: list[float], options: SamplingOptions) -> Answer:
    return Answer([0], limit=2, options=options, uniforms=uniforms)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 1.5, "min_p": 0.2}]
)
@pytest.mark.parametrize("certain", [True, False])
def test_a_checked_token_follows_the_models_distribution(options, certain):
    torch.manual_seed(0)
    options = SamplingOptions(**options)
    logits, other = torch.randn(2, 2, V, dtype=torch.float64)
    target = answer_with([], options)
    p = next_logits(target, logits[0]).double().softmax(-1)
    q = next_logits(target, other[0]).double().softmax(-1)
    n, counts = 2000, torch.zeros(V)
    numbers = torch.rand(n, n_uniforms(2), generator=torch.Generator().manual_seed(1)).tolist()
    guesses = torch.multinomial(q, n, replacement=True, generator=torch.Generator().manual_seed(2)).tolist()
    for uniforms, guess in zip(numbers, guesses, strict=True):
        draft = Draft([2]) if certain else Draft([guess], q[None])
        counts[next(check_draft(answer_with(uniforms, options), draft, logits))] += 1
    assert chi_square(counts, p) < 20.5  # 5 degrees of freedom: exceeded once in a thousand
    taken_as_it_is = torch.bincount(torch.tensor(guesses), minlength=V).float()
    if not certain and not options.top_k:
        with pytest.raises(AssertionError):
            assert chi_square(taken_as_it_is, p) < 20.5  # the test does tell q from p


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_sampled_answers_follow_the_models_distribution(kind):
    torch.manual_seed(3)
    sizes = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "max_position_embeddings": 16, "initializer_range": 0.6}
    model, smaller = Transformer(ModelConfig(**sizes)), Transformer(ModelConfig(**sizes))
    prompt = [1, 2, 3, 1, 2]
    drafter = PromptLookup(n_match=1, n_draft=2) if kind == "lookup" else DraftModel(smaller, n_draft=2)
    engine = Engine(model, page_len=4, n_pages=400, max_batch=100, max_batch_tokens=1000, drafter=drafter)
    n, options = 500, SamplingOptions(temperature=0.9)
    settings = {"max_new_tokens": 3, "sampling": options, "eos_token_id": ()}
    requests = [engine.submit(prompt, seed=seed, **settings) for seed in range(n)]
    engine.run()
    assert 0 < engine.stats.n_accepted < engine.stats.n_drafted
    first, second = torch.zeros(V), torch.zeros(V, V)
    for request in requests:
        a, b = request.new_ids[1:]
        second[a, b] += 1
        first[request.new_ids[0]] += 1
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1].double() / 0.9).softmax(-1)
        continued = torch.tensor([[*prompt, x, y] for x in range(V) for y in range(V)])
        after = (model(continued).double() / 0.9).softmax(-1)
    p2 = after[:, len(prompt)].view(V, V, V)[:, 0]  # (first, second)
    p3 = after[:, len(prompt) + 1].view(V, V, V)  # (first, second, third)
    assert chi_square(first, p) < 20.5
    joint = torch.einsum("a,ab,abc->bc", p, p2, p3)
    assert chi_square(second.flatten(), joint.flatten()) < 66.6  # 35 degrees of freedom


def test_what_lookup_guesses():
    def guess(ids: list[int], new: list[int] = (), limit: int = 20) -> list[int]:
        answer = Answer(ids, limit=limit, options=SamplingOptions(temperature=0))
        for token in new:
            answer.push(token)
        return lookup.propose(Request(0, answer)).ids

    lookup = PromptLookup(n_draft=3, n_match=2)
    assert guess([1, 2, 3, 4, 5, 1, 2]) == [3, 4, 5]
    lookup = PromptLookup(n_draft=3, n_match=2)
    assert guess([1, 2, 3, 1, 2, 4, 1, 2]) == [4, 1, 2]  # the latest place
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], [3]) == [1, 2, 4]  # goes on behind what it has read
    assert guess([1, 2, 3, 1, 2, 4, 1, 2], [3, 9]) == []
    lookup = PromptLookup(n_draft=3, n_match=2)
    assert guess([7, 7, 7]) == [7]
    assert PromptLookup().propose(Request(0, Answer([1], limit=5, options=SamplingOptions()))).ids == []
    lookup = PromptLookup(n_draft=9, n_match=2)
    assert guess([1, 2, 3, 4, 1, 2], limit=2) == [3]  # the last token comes from the model in any case


def test_bad_sizes():
    with pytest.raises(UserError, match="n_draft 0"):
        PromptLookup(n_draft=0)
