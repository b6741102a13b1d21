"""Exercises of chapter 11: choosing with a bias, the load of experts, and a mean that forgets the idle ones."""

import torch

from minillm.config import ModelConfig
from minillm.model.moe import Router, update_router_bias
from tests.exercises.kit import exercise, find_the_bug


def router_for(n_experts: int, n_chosen: int, bias) -> Router:
    """Return a router whose logits are its inputs."""
    config = ModelConfig(
        hidden_size=n_experts, head_dim=2, num_attention_heads=1, num_key_value_heads=1, num_experts=n_experts,
        num_experts_per_tok=n_chosen, n_shared_experts=1, scoring_func="sigmoid",
    )  # fmt: skip
    router = Router(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(n_experts))
        router.e_score_correction_bias.copy_(bias)
    return router


def library_route(scores, bias, n_chosen):
    _, _, chosen, weights = router_for(scores.shape[1], n_chosen, bias)(torch.logit(scores))
    return chosen, weights.detach()


def biased_weights(scores, bias, n_chosen):
    best = (scores + bias).topk(n_chosen)
    return best.indices, best.values / best.values.sum(-1, keepdim=True)


def without_bias(scores, bias, n_chosen):
    best = scores.topk(n_chosen)
    return best.indices, best.values / best.values.sum(-1, keepdim=True)


def not_normalised(scores, bias, n_chosen):
    chosen = (scores + bias).topk(n_chosen).indices
    return chosen, scores.gather(1, chosen)


def softmax_of_chosen(scores, bias, n_chosen):
    chosen, weights = not_normalised(scores, bias, n_chosen)
    return chosen, weights.softmax(-1)


@exercise(
    "ch11_route",
    solution=library_route,
    wrong={
        "bias in the weights": (biased_weights, "in proportion to the scores"),
        "no bias": (without_bias, "score plus bias"),
        "not normalised": (not_normalised, "add up to 1"),
        "softmax of the chosen": (softmax_of_chosen, "in proportion to the scores"),
    },
)
def test_route(candidate):
    scores, bias = torch.tensor([[0.8, 0.6, 0.2, 0.4], [0.1, 0.3, 0.9, 0.5]]), torch.tensor([-0.5, 0.0, 0.3, 0.0])
    chosen, weights = candidate(scores, bias, 2)
    assert chosen.shape == weights.shape == (2, 2), "k experts and k weights for each token"
    assert chosen.sort().values.tolist() == [[1, 2], [2, 3]], "the experts with the largest score plus bias are chosen"
    assert torch.allclose(weights.sum(dim=1), torch.ones(2)), "the weights of a token add up to 1"
    picked = scores.gather(1, chosen)
    assert torch.allclose(weights, picked / picked.sum(dim=1, keepdim=True)), (
        "weights are in proportion to the scores; the bias says who works, not how much it counts"
    )


def library_load(chosen, is_token, n_experts):
    counts = torch.bincount(chosen[is_token].flatten(), minlength=n_experts).double()
    return counts / counts.mean()


def with_padding(chosen, is_token, n_experts):
    return library_load(chosen, torch.ones_like(is_token), n_experts)


def without_idle(chosen, is_token, n_experts):
    counts = torch.bincount(chosen[is_token].flatten()).double()
    return counts / counts.mean()


def per_token(chosen, is_token, n_experts):
    return torch.bincount(chosen[is_token].flatten(), minlength=n_experts) / is_token.sum() * n_experts


@exercise(
    "ch11_load",
    solution=library_load,
    wrong={
        "with padding": (with_padding, "padding"),
        "idle experts missing": (without_idle, "idle"),
        "shares": (lambda *args: library_load(*args) / args[2], "units of the mean"),
        "k forgotten": (per_token, "k choices"),
    },
)
def test_load_of_experts(candidate):
    chosen, is_token = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 2]]), torch.tensor([True, True, True, False])
    load = candidate(chosen, is_token, 5)
    assert load.shape == (5,), "an idle expert has a load too: 0"
    even = candidate(torch.tensor([[0], [1], [2], [3]]), torch.ones(4, dtype=torch.bool), 4)
    assert torch.allclose(even, torch.ones_like(even)), "in units of the mean, an even load is 1 for every expert"
    assert load[3] == 0, "padding chooses nobody"
    assert abs(float(load.mean()) - 1) < 1e-6, "the mean over all experts is 1: each token makes k choices"
    assert torch.allclose(load.double(), torch.tensor([2.5, 5 / 3, 5 / 6, 0, 0], dtype=torch.float64)), (
        "experts 0, 1 and 2 were chosen 3, 2 and 1 times: divide by the mean of 6 / 5"
    )


def right_next_bias(bias, counts, speed):
    router = router_for(len(bias), 1, bias)
    update_router_bias(router, counts[None].float(), speed)
    return router.e_score_correction_bias.to(bias.dtype)


def finder(next_bias):
    moved = next_bias(torch.zeros(4), torch.tensor([0.0, 5.0, 6.0, 9.0]), 0.1)  # mean 5; without the idle one 6.67
    assert torch.allclose(moved, torch.tensor([0.1, 0.0, -0.1, -0.1])), "6 of 20 tokens are more than a fourth"


def all_busy(next_bias):
    moved = next_bias(torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 6.0]), 0.1)
    assert torch.allclose(moved, torch.tensor([0.1, 0.1, 0.0, -0.1])), "an idle expert is needed to see it"


def the_idle_one(next_bias):
    moved = next_bias(torch.zeros(4), torch.tensor([0.0, 5.0, 6.0, 9.0]), 0.1)
    assert moved[0] > 0, "the idle one goes up in both"
    assert moved[3] < 0, "the busiest one goes down in both"


def balanced(next_bias):
    assert torch.equal(next_bias(torch.ones(4), torch.full((4,), 5.0), 0.1), torch.ones(4)), "even load hides it"


test_find_the_bug = find_the_bug(
    "ch11_bug",
    right=right_next_bias,
    finder=finder,
    hint="it hides while every expert has tokens, and in experts far above or below the mean",
    wrong={"all busy": all_busy, "the idle one": the_idle_one, "balanced": balanced},
)
