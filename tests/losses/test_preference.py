"""The losses of preference tuning against their formulas, written out in Python floats."""

import math

import pytest
import torch

from minillm.errors import UserError
from minillm.losses import dpo_loss, kto_baseline, kto_loss
from minillm.losses.preference import LOSS_TYPES, NEEDS_LENGTHS, NEEDS_REFERENCE

BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}
# Every loss, with every setting that it knows.
CASES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "sigmoid", "beta": 0.7, "label_smoothing": 0.2},
    {"loss_type": "sigmoid", "sft_weight": 0.3},
    {"loss_type": "robust", "label_smoothing": 0.3},
    {"loss_type": "ipo", "beta": 0.4},
    {"loss_type": "hinge", "beta": 0.2},
    {"loss_type": "simpo", "beta": 2.0, "gamma": 0.6},
    {"loss_type": "simpo", "beta": 2.0, "gamma": 0.6, "label_smoothing": 0.1},
    {"loss_type": "orpo", "beta": 0.25},
    {"loss_type": "orpo", "beta": 0.25, "sft_weight": 0.5},
]
IDS = [" ".join(str(value) for value in case.values()) for case in CASES]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def one_pair(
    chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected,
    *, loss_type, beta=0.1, label_smoothing=0.0, gamma=0.0, sft_weight=0.0,
) -> float:  # fmt: skip
    """The loss of one pair, as its paper has it."""
    reward = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    right, wrong = -log_sigmoid(reward), -log_sigmoid(-reward)  # if the chosen, or the rejected, is the better one
    mean_chosen, mean_rejected = chosen / n_chosen, rejected / n_rejected
    if loss_type == "sigmoid":
        loss = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        loss = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "ipo":
        loss = ((chosen - ref_chosen) / n_chosen - (rejected - ref_rejected) / n_rejected - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        loss = max(0.0, 1 - reward)
    elif loss_type == "simpo":
        reward = beta * mean_chosen - beta * mean_rejected - gamma
        loss = -(1 - label_smoothing) * log_sigmoid(reward) - label_smoothing * log_sigmoid(-reward)
    elif loss_type == "orpo":
        odds_chosen, odds_rejected = (math.exp(x) / (1 - math.exp(x)) for x in (mean_chosen, mean_rejected))
        loss = -mean_chosen - beta * log_sigmoid(math.log(odds_chosen / odds_rejected))
    return loss - sft_weight * mean_chosen


def pairs(case, dtype, n=23, **changed):
    """Random pairs with what ``dpo_loss`` takes for this case: (arguments, keywords)."""
    generator = torch.Generator().manual_seed(2)
    lengths = [torch.randint(1, 30, (n,), generator=generator) for _ in range(2)]
    means = [-torch.rand(n, dtype=torch.float64, generator=generator) * 3 - 0.01 for _ in range(2)]
    sums = [mean * length for mean, length in zip(means, lengths, strict=True)]
    shifts = [torch.randn(n, dtype=torch.float64, generator=generator) * 5 for _ in range(2)]
    references = [total + shift for total, shift in zip(sums, shifts, strict=True)]
    tensors = sums + references if case["loss_type"] in NEEDS_REFERENCE else sums
    tensors = [tensor.to(dtype) for tensor in tensors]
    for policy in tensors[:2]:
        policy.requires_grad_()
    return tensors, {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]} | case | changed


def rows(tensors, keywords):
    """Each pair as Python floats: chosen, rejected, the references (0 without), the lengths."""
    tensors = [tensor.detach() for tensor in tensors]
    tensors += [torch.zeros_like(tensors[0])] * (4 - len(tensors))
    return torch.stack([*tensors, keywords["chosen_lengths"], keywords["rejected_lengths"]], 1).double().tolist()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_the_formula(case, dtype):
    tensors, keywords = pairs(case, dtype)
    loss_sum, n_pairs = dpo_loss(*tensors, **keywords)
    wanted = sum(one_pair(*row, **case) for row in rows(tensors, keywords))
    assert abs(loss_sum.item() - wanted) <= BOUND[dtype] * abs(wanted)
    assert (loss_sum.dtype, n_pairs.dtype, n_pairs.item()) == (dtype, torch.float64, 23)


@pytest.mark.parametrize("case", [case for case in CASES if case["loss_type"] in NEEDS_REFERENCE], ids=lambda c: str(c))
def test_without_a_reference_it_is_uniform(case):
    """A reference that finds every reply as likely as any other shifts nothing."""
    (chosen, rejected, *_), keywords = pairs(case, torch.float64)
    loss_sum, _ = dpo_loss(chosen, rejected, **keywords)
    wanted = sum(one_pair(*row, **case) for row in rows([chosen, rejected], keywords))
    assert abs(loss_sum.item() - wanted) <= 1e-12 * abs(wanted)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradcheck(case):
    tensors, keywords = pairs(case, torch.float64)

    def loss(chosen, rejected):
        return dpo_loss(chosen, rejected, *tensors[2:], **keywords)[0]

    assert torch.autograd.gradcheck(loss, tensors[:2])


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_parts_add_up_to_the_whole(case):
    tensors, keywords = pairs(case, torch.float64)
    whole, n_pairs = dpo_loss(*tensors, **keywords)
    gradients = torch.autograd.grad(whole, tensors[:2])
    for cut in (1, 9, 23):  # the last: no pair is left for the second part
        parts = []
        for part in (slice(None, cut), slice(cut, None)):
            own = {name: keywords[name][part] for name in ("chosen_lengths", "rejected_lengths")}
            parts.append(dpo_loss(*(tensor[part] for tensor in tensors), **keywords | own))
        assert parts[0][1].item() + parts[1][1].item() == n_pairs.item()
        loss_sum = parts[0][0] + parts[1][0]
        assert loss_sum.item() == pytest.approx(whole.item(), rel=1e-13)
        for ours, wanted in zip(torch.autograd.grad(loss_sum, tensors[:2]), gradients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=0)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_no_pair_is_exactly_zero(case):
    tensors, keywords = pairs(case, torch.float32, n=0)
    loss_sum, n_pairs = dpo_loss(*tensors, **keywords)
    assert (loss_sum.item(), n_pairs.item()) == (0.0, 0.0)
    assert [len(gradient) for gradient in torch.autograd.grad(loss_sum, tensors[:2])] == [0, 0]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("loss_type", ["sigmoid", "robust"])
def test_first_step_is_ln_2(loss_type, dtype):
    """Where policy and reference are equal, so at the first step, the loss of every pair is ln 2 to the last bit."""
    ln_2 = torch.tensor(math.log(2), dtype=dtype)
    for thousandth in range(500):
        chosen, rejected = -torch.rand(2, 1, dtype=dtype, generator=torch.Generator().manual_seed(thousandth)) * 100
        loss_sum, _ = dpo_loss(
            chosen, rejected, chosen, rejected, loss_type=loss_type, label_smoothing=thousandth / 1000
        )
        assert torch.equal(loss_sum, ln_2), thousandth


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_extremes_stay_finite(case):
    """Log-probabilities from -10,000 to 0, whose exponentials underflow or leave no odds; log-ratios both ways."""
    values = torch.tensor([0.0, -1e-9, -1e-3, -50.0, -1e4])
    chosen, rejected = torch.cartesian_prod(values, values).T.contiguous()
    references = [rejected.clone(), chosen.clone()] if case["loss_type"] in NEEDS_REFERENCE else []
    chosen.requires_grad_(), rejected.requires_grad_()
    ones = torch.ones(len(chosen))
    loss_sum, _ = dpo_loss(chosen, rejected, *references, chosen_lengths=ones, rejected_lengths=ones, **case)
    assert torch.isfinite(loss_sum)
    for gradient in torch.autograd.grad(loss_sum, (chosen, rejected)):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_orpo_keeps_its_digits_near_certainty(dtype):
    """A reply of mean log-probability -10⁻⁵ has odds of 10⁵; 1 - exp(x) in float32 would know them to 2 digits."""
    for mean in (-1e-5, -1e-3, -0.6, -0.8, -30.0):
        chosen, rejected = torch.tensor([[mean], [-0.5]], dtype=dtype)
        one = torch.ones(1)
        ours, _ = dpo_loss(rejected, chosen, loss_type="orpo", beta=1.0, chosen_lengths=one, rejected_lengths=one)
        log_odds = [x - math.log(-math.expm1(x)) for x in (rejected.item(), chosen.item())]
        wanted = -rejected.item() - log_sigmoid(log_odds[0] - log_odds[1])
        assert abs(ours.item() - wanted) <= BOUND[dtype] * wanted


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_first_step_prefers_the_chosen(case):
    """Of two replies that are equally likely, under the reference too, one becomes more likely, the other less."""
    chosen, rejected = (torch.full((1,), -20.0, requires_grad=True) for _ in range(2))
    references = [torch.full((1,), -20.0)] * 2 if case["loss_type"] in NEEDS_REFERENCE else []
    lengths = {"chosen_lengths": torch.tensor([10]), "rejected_lengths": torch.tensor([10])}
    gradients = torch.autograd.grad(dpo_loss(chosen, rejected, *references, **lengths, **case)[0], (chosen, rejected))
    assert gradients[0].item() < 0 < gradients[1].item()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss_type": "dpo"}, r"loss_type 'dpo': choose from sigmoid"),
        ({"loss_type": "kto"}, r"kto_loss"),
        ({"beta": 0.0}, r"beta 0.0: must be positive"),
        ({"beta": -1.0}, r"beta -1.0: must be positive"),
        ({"label_smoothing": 0.5}, r"label_smoothing 0.5: must be 0 to below 0.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing -0.1: must be 0 to below 0.5"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing 0.5"),
        *(
            ({"loss_type": loss_type, "label_smoothing": 0.1}, rf"goes with .*, not {loss_type}")
            for loss_type in ("ipo", "hinge", "orpo")
        ),
        *(
            ({"loss_type": loss_type, "gamma": 0.1}, rf"gamma 0.1: goes with simpo, not {loss_type}")
            for loss_type in LOSS_TYPES
            if loss_type != "simpo"
        ),
        ({"loss_type": "simpo", "gamma": -0.1}, r"gamma -0.1.*not be negative"),
        ({"sft_weight": -0.1}, r"sft_weight -0.1: must not be negative"),
        *(
            ({"loss_type": loss_type, name: None}, r"give chosen_lengths and rejected_lengths")
            for loss_type in sorted(NEEDS_LENGTHS)
            for name in ("chosen_lengths", "rejected_lengths")
        ),
        ({"sft_weight": 0.1, "chosen_lengths": None}, r"give chosen_lengths"),
    ],
    ids=str,
)
def test_refuses_settings_that_do_not_go_together(changed, message):
    tensors, keywords = pairs({"loss_type": changed.get("loss_type", "sigmoid")}, torch.float32, **changed)
    with pytest.raises(UserError, match=message):
        dpo_loss(*tensors, **keywords)


def test_refuses_half_a_reference_and_a_needless_one():
    (chosen, rejected, *references), keywords = pairs({"loss_type": "sigmoid"}, torch.float32)
    for half in ((references[0], None), (None, references[1])):
        with pytest.raises(UserError, match="give both or neither"):
            dpo_loss(chosen, rejected, *half, **keywords)
    for loss_type in ("simpo", "orpo"):
        with pytest.raises(UserError, match=f"{loss_type} has no reference"):
            dpo_loss(chosen, rejected, *references, **keywords | {"loss_type": loss_type})


# ---- KTO ---------------------------------------------------------------------------------------------------------


def judged(dtype, n=23):
    generator = torch.Generator().manual_seed(3)
    policy = -torch.rand(n, dtype=torch.float64, generator=generator) * 50
    reference = policy + torch.randn(n, dtype=torch.float64, generator=generator) * 5
    labels = torch.rand(n, generator=generator) < 0.4
    return policy.to(dtype).requires_grad_(), reference.to(dtype), labels


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_kto_equals_the_formula(dtype, baseline):
    policy, reference, labels = judged(dtype)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    loss_sum, n_replies = kto_loss(policy, reference, labels, torch.tensor(baseline, dtype=dtype), beta=0.3, **weights)
    wanted, baseline = 0.0, torch.tensor(baseline, dtype=dtype).item()
    for log_pi, log_ref, is_good in zip(policy.tolist(), reference.tolist(), labels.tolist(), strict=True):
        above = 0.3 * (log_pi - log_ref - baseline)
        wanted += 1.3 * (1 - 1 / (1 + math.exp(-above))) if is_good else 0.6 * (1 - 1 / (1 + math.exp(above)))
    assert abs(loss_sum.item() - wanted) <= BOUND[dtype] * wanted
    assert (loss_sum.dtype, n_replies.dtype, n_replies.item()) == (dtype, torch.float64, 23)


def test_kto_gradcheck_and_no_gradient_through_the_baseline():
    policy, reference, labels = judged(torch.float64)
    baseline = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda policy: kto_loss(policy, reference, labels, baseline)[0], policy)
    (gradient,) = torch.autograd.grad(
        kto_loss(policy, reference, labels, baseline)[0], baseline, allow_unused=True, retain_graph=True
    )
    assert gradient is None


def test_kto_parts_add_up_and_nothing_is_zero():
    policy, reference, labels = judged(torch.float64)
    baseline = torch.tensor(0.8, dtype=torch.float64)
    whole, _ = kto_loss(policy, reference, labels, baseline)
    for cut in (1, 9, 23):
        parts = [
            kto_loss(policy[part], reference[part], labels[part], baseline)
            for part in (slice(None, cut), slice(cut, None))
        ]
        assert sum(loss_sum.item() for loss_sum, _ in parts) == pytest.approx(whole.item(), rel=1e-13)
        assert sum(n.item() for _, n in parts) == 23
    assert [figure.item() for figure in parts[1]] == [0.0, 0.0]


def test_kto_extremes():
    """Far from the baseline a reply costs all of its weight or nothing, to the digits of the smallest floats."""
    policy = torch.tensor([1e4, -1e4, 300.0], requires_grad=True)
    labels = torch.tensor([True, True, True])
    loss_sum, _ = kto_loss(policy, torch.zeros(3), labels, torch.tensor(0.0))
    assert loss_sum.item() == 1.0
    assert torch.isfinite(torch.autograd.grad(loss_sum, policy)[0]).all()
    small, _ = kto_loss(policy[2:], torch.zeros(1), labels[2:], torch.tensor(0.0))
    assert small.item() == pytest.approx(math.exp(-30), rel=1e-5, abs=0)  # 1 - σ(30) in float32 would be 0
    with pytest.raises(UserError, match=r"beta 0.0: must be positive"):
        kto_loss(policy, policy, labels, torch.tensor(0.0), beta=0.0)


def test_kto_baseline_is_a_mean_and_never_negative():
    total = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    baseline = kto_baseline(total, torch.tensor(4.0))
    assert (baseline.item(), baseline.requires_grad) == (1.5, False)
    assert kto_baseline(torch.tensor(-6.0), torch.tensor(4.0)).item() == 0.0
    assert kto_baseline(torch.tensor(0.0), torch.tensor(0.0)).item() == 0.0
