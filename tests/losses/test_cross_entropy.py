"""The loss against its formula, whole and in chunks."""

import importlib
import math

import pytest
import torch

from minillm.losses import causal_lm_loss, count_targets, cross_entropy, linear_cross_entropy

module = importlib.import_module("minillm.kernels.linear_cross_entropy")


def formula(logits, targets, weights=None):
    """One position at a time, in float64."""
    loss_sum, n_targets = 0.0, 0.0
    for place, target in enumerate(targets.flatten().tolist()):
        if target != -100:
            weight = 1.0 if weights is None else weights.flatten()[place].double()
            row = logits.reshape(-1, logits.shape[-1])[place].double()
            loss_sum = loss_sum + weight * (torch.logsumexp(row, 0) - row[target])
            n_targets = n_targets + weight
    return loss_sum, n_targets


@pytest.fixture(params=["all targets", "ragged", "weighted"])
def problem(request):
    """hidden (3, 7, 5), output weight (11, 5), targets, weights: float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(11, (3, 7), generator=generator)
    weights = None
    if request.param != "all targets":
        targets[torch.rand(3, 7, generator=generator) < 0.4] = -100
        targets[1] = -100
    if request.param == "weighted":
        weights = torch.rand(3, 7, generator=generator) * 3
        weights[0, ::2] = 0
    return hidden, weight, targets, weights


@pytest.mark.parametrize("chunk_numel", [11 * 1000, 11 * 4, 1], ids=["one chunk", "chunks of 4", "one position each"])
def test_equals_the_formula_in_value_and_gradient(problem, monkeypatch, chunk_numel):
    monkeypatch.setattr(module, "CHUNK_NUMEL", chunk_numel)
    hidden, weight, targets, weights = problem
    wanted, n_wanted = formula(hidden @ weight.T, targets, weights)
    wanted_gradients = torch.autograd.grad(2.5 * wanted, (hidden, weight), retain_graph=True)
    for ours, n_targets in (
        cross_entropy(hidden @ weight.T, targets, weights),
        linear_cross_entropy(hidden, weight, targets, weights),
    ):
        assert abs((ours - wanted).item()) < 1e-12 * abs(wanted.item()) + 1e-13
        assert n_targets.dtype == torch.float64
        assert float(n_targets) == pytest.approx(float(n_wanted), rel=1e-12)
        for gradient, reference in zip(
            torch.autograd.grad(2.5 * ours, (hidden, weight)), wanted_gradients, strict=True
        ):
            assert ((gradient - reference).norm() / reference.norm()).item() < 1e-12


def test_gradcheck(problem, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMEL", 11 * 4)
    hidden, weight, targets, weights = problem
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, weights)[0], (hidden, weight))
    logits = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: cross_entropy(logits, targets, weights)[0], logits)


def test_no_target_is_exactly_zero():
    hidden = torch.randn(2, 3, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.full((2, 3), -100)
    for loss_sum, n_targets in (
        linear_cross_entropy(hidden, weight, targets),
        cross_entropy(hidden @ weight.T, targets),
        linear_cross_entropy(hidden, weight, targets.clone().fill_(3), torch.zeros(2, 3)),
    ):
        assert (loss_sum.item(), n_targets.item()) == (0.0, 0.0)
        for gradient in torch.autograd.grad(loss_sum, (hidden, weight)):
            assert (gradient == 0).all()


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_one_side_needs_a_gradient(problem, wanted):
    hidden, weight, targets, weights = problem
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, weights)[0], (hidden, weight))
    if wanted == "hidden":
        loss_sum, _ = linear_cross_entropy(hidden, weight.detach(), targets, weights)
        assert torch.equal(torch.autograd.grad(loss_sum, hidden)[0], both[0])
    else:
        loss_sum, _ = linear_cross_entropy(hidden.detach(), weight, targets, weights)
        assert torch.equal(torch.autograd.grad(loss_sum, weight)[0], both[1])


def test_without_gradients_the_value_is_the_same(problem):
    hidden, weight, targets, weights = problem
    with torch.no_grad():
        value, _ = linear_cross_entropy(hidden, weight, targets, weights)
    assert torch.equal(value, linear_cross_entropy(hidden, weight, targets, weights)[0].detach())
    assert not value.requires_grad


def test_parts_add_up_to_the_whole(problem):
    """Sums, counts and gradients of any parts add up; means would not."""
    hidden, weight, targets, weights = problem
    whole = linear_cross_entropy(hidden, weight, targets, weights)
    gradients = torch.autograd.grad(whole[0], (hidden, weight))
    for cut in (1, 2):
        parts = [
            linear_cross_entropy(hidden[rows], weight, targets[rows], None if weights is None else weights[rows])
            for rows in (slice(None, cut), slice(cut, None))
        ]
        for index in (0, 1):
            assert parts[0][index].item() + parts[1][index].item() == pytest.approx(whole[index].item(), rel=1e-13)
        ours = torch.autograd.grad(parts[0][0] + parts[1][0], (hidden, weight))
        for gradient, reference in zip(ours, gradients, strict=True):
            assert ((gradient - reference).norm() / reference.norm()).item() < 1e-13


def test_a_second_derivative_is_refused():
    """The gradient is formed in the forward pass, as a constant: its own derivative would silently be wrong."""
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64)
    loss_sum, _ = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100]))
    (gradient,) = torch.autograd.grad(loss_sum**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_large_logits_stay_finite():
    """exp(10⁴) overflows even float64; the exact loss is the distance to the largest logit."""
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    targets = torch.tensor([1, 2])
    for loss_sum, _ in (linear_cross_entropy(hidden, weight, targets), cross_entropy(hidden @ weight.T, targets)):
        assert loss_sum.item() == 1e4
        for gradient in torch.autograd.grad(loss_sum, (hidden, weight)):
            assert torch.isfinite(gradient).all()


def test_logits_of_short_dtypes_are_widened():
    """In bfloat16 the loss of 1,000 equal logits would be 6.9 rounded to 8 bits."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    loss_sum, _ = cross_entropy(logits, torch.tensor([7]))
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_under_autocast(problem):
    hidden, weight, targets, weights = problem
    hidden, weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    wanted, _ = linear_cross_entropy(hidden, weight, targets, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = linear_cross_entropy(hidden, weight, targets, weights)
    assert ours.dtype == torch.float32
    assert ours.item() != wanted.item()  # the product did run in bfloat16
    assert ours.item() == pytest.approx(wanted.item(), rel=0.02)  # bfloat16 has 8 bits
    pairs = zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, wanted)), strict=True)
    for gradient, reference in pairs:
        assert gradient.dtype == torch.float32
        assert ((gradient - reference).norm() / reference.norm()).item() < 0.02


def test_counts():
    targets = torch.tensor([[1, -100, 3], [-100, -100, 0]])
    assert count_targets(targets).item() == 3
    assert count_targets(targets, torch.tensor([[0.5, 9.0, 1.0], [9.0, 9.0, 0.25]])).item() == 1.75
    assert count_targets(targets).dtype == torch.float64


def test_the_models_forward_holds_the_loss():
    """A wrapper around the model (DDP, FSDP) must see the use of its output weight."""
    seen = {}

    def model(input_ids, *, position_ids, document_ids, document_bounds, head, router_stats):
        assert router_stats is None
        seen.update(input_ids=input_ids, position_ids=position_ids, document_ids=document_ids)
        return head(torch.ones(1, 2, 3), torch.eye(3)[:2])

    batch = {name: torch.tensor([[0, 1]]) for name in ("input_ids", "targets", "position_ids", "document_ids")}
    loss_sum, n_targets = causal_lm_loss(model, batch)
    assert loss_sum.item() == pytest.approx(2 * math.log(2))
    assert n_targets.item() == 2
    assert seen.keys() == {"input_ids", "position_ids", "document_ids"}
    batch["weights"] = torch.tensor([[0.0, 3.0]])
    assert causal_lm_loss(model, batch)[1].item() == 3


def test_the_routers_losses_join_the_sum():
    """begin, forward, finish: in this order, and only the sum changes."""
    calls = []

    class Stats:
        def begin(self, batch):
            calls.append(("begin", batch))

        def finish(self):
            calls.append(("finish", None))
            return torch.tensor(0.5, requires_grad=True)

    def model(input_ids, *, position_ids, document_ids, document_bounds, head, router_stats):
        calls.append(("forward", router_stats))
        return head(torch.ones(1, 2, 3), torch.eye(3)[:2])

    batch, stats = {"input_ids": torch.tensor([[0, 1]]), "targets": torch.tensor([[1, -100]])}, Stats()
    loss_sum, n_targets = causal_lm_loss(model, batch, stats)
    assert calls == [("begin", batch), ("forward", stats), ("finish", None)]
    assert loss_sum.item() == pytest.approx(math.log(2) + 0.5)
    assert loss_sum.requires_grad
    assert n_targets.item() == 1
