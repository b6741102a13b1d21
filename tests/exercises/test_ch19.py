"""Exercises of chapter 19: the DPO loss, its best margin, and the log-probability of an answer."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import dpo_loss, sequence_log_probs
from tests.exercises.kit import exercise, find_the_bug


def by_library(*log_probs_and_beta):
    *log_probs, beta = log_probs_and_beta
    pairs = zip(*log_probs, strict=True)
    return torch.stack([dpo_loss(*(value[None] for value in pair), beta=beta)[0] for pair in pairs])


def delta(pc, pr, rc, rr):
    return (pc - rc) - (pr - rr)


@exercise(
    "ch19_dpo",
    solution=by_library,
    wrong={
        "sides exchanged": (lambda pc, pr, rc, rr, beta: -F.logsigmoid(-beta * delta(pc, pr, rc, rr)), "chosen minus"),
        "no reference": (lambda pc, pr, rc, rr, beta: -F.logsigmoid(beta * (pc - pr)), "reference"),
        "log of sigmoid": (
            lambda pc, pr, rc, rr, beta: -torch.sigmoid(beta * delta(pc, pr, rc, rr)).log(),
            "logsigmoid",
        ),
        "beta outside": (lambda pc, pr, rc, rr, beta: -beta * F.logsigmoid(delta(pc, pr, rc, rr)), "inside"),
        "the mean": (lambda *args: by_library(*args).mean(), "one loss per pair"),
    },
)
def test_dpo(candidate):
    same = torch.tensor([-30.0, -12.0, -7.0])
    other = torch.tensor([-25.0, -14.0, -7.0])
    start = candidate(same, other, same, other, 0.1)
    assert tuple(start.shape) == (3,), "return one loss per pair, not a sum or a mean"
    assert float(start[2]) == pytest.approx(math.log(2)), "beta stands inside of the sigmoid: the start is ln 2"
    assert start.tolist() == pytest.approx([math.log(2)] * 3), "subtract the reference: at the start all are ln 2"
    better = candidate(same + 5, other - 5, same, other, 0.1)
    assert float(better[0]) < math.log(2), "the margin is chosen minus rejected: a good one has a loss below ln 2"
    assert better.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-1)))] * 3), (
        "chosen 5 nats up, rejected 5 down, beta 0.1: -ln sigmoid(1)"
    )
    far = candidate(same - 2000, other, same, other, 0.1)
    assert far.tolist() == pytest.approx([200.0] * 3), "the logarithm of a sigmoid that is 0 is -inf: use logsigmoid"


@exercise(
    "ch19_margin",
    solution=lambda share, beta: math.log(share / (1 - share)) / beta,
    wrong={
        "without beta": (lambda share, beta: math.log(share / (1 - share)), "divided by beta"),
        "times beta": (lambda share, beta: beta * math.log(share / (1 - share)), "divided by beta"),
        "log of the share": (lambda share, beta: math.log(share) / beta, "half"),
        "without limit": (lambda share, beta: 1e3, "half"),
        "never negative": (lambda share, beta: abs(math.log(share / (1 - share))) / beta, "negative"),
    },
)
def test_best_margin(candidate):
    assert float(candidate(0.5, 0.1)) == pytest.approx(0, abs=1e-9), "with half on either side no answer is better"
    assert float(candidate(0.2, 0.1)) < 0, "where most choose the second answer, the margin is negative"
    for share, beta in ((0.8, 0.1), (0.3, 0.5)):
        d = float(candidate(share, beta))
        assert 1 / (1 + math.exp(-beta * d)) == pytest.approx(share), (
            "sigmoid(beta Delta) is the share there, so the log odds are divided by beta"
        )


def right(log_probs, targets):
    return sequence_log_probs(log_probs, targets)[0][:, 0]


def finder(answer_log_prob):
    log_probs = torch.tensor([[0.0, -1.0, -2.0], [0.0, 0.0, -3.0]])
    targets = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    assert answer_log_prob(log_probs, targets).tolist() == [-3.0, -3.0], "probabilities of tokens multiply"


def one_token(answer_log_prob):
    log_probs, targets = torch.tensor([[0.0, -2.0]]), torch.tensor([[-100, 4]])
    assert answer_log_prob(log_probs, targets).tolist() == [-2.0], "answers of one token hide it"


def order(answer_log_prob):
    log_probs, targets = torch.tensor([[-1.0, -1.0], [-2.0, -2.0]]), torch.ones(2, 2, dtype=torch.long)
    good, bad = answer_log_prob(log_probs, targets)
    assert good > bad, "equal lengths hide it"


def no_answer(answer_log_prob):
    assert answer_log_prob(torch.zeros(1, 3), torch.full((1, 3), -100)).tolist() == [0.0], "nothing hides it"


def mean(answer_log_prob):
    log_probs, targets = torch.tensor([[-1.0, -2.0]]), torch.tensor([[3, 4]])
    assert answer_log_prob(log_probs, targets).tolist() == [-1.5], "expects the fault itself"


test_find_the_bug = find_the_bug(
    "ch19_bug",
    right=right,
    finder=finder,
    hint="it hides in answers of one token, and in the order of answers that are equally long",
    wrong={"one token": one_token, "equal lengths": order, "no answer": no_answer, "expects the fault": mean},
)
