"""Log-probabilities of tokens against the whole logits, and of sequences against a loop over documents."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from minillm.losses import linear_log_probs, sequence_log_probs

module = importlib.import_module("minillm.kernels.linear_log_probs")
BOUND = {torch.float32: 1e-6, torch.float64: 1e-12}


def formula(logits, targets):
    """All logits at once: log-softmax, then the target's entry; 0 where there is no target."""
    counted = targets != -100
    found = F.log_softmax(logits, dim=-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(counted, found, 0.0)


def difference(ours, wanted) -> float:
    return ((ours.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(params=["all targets", "ragged"])
def problem(request):
    """hidden (3, 7, 5), output weight (11, 5), targets (3, 7) and a factor for every position: float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(11, (3, 7), generator=generator)
    factors = torch.randn(3, 7, dtype=torch.float64, generator=generator)
    if request.param == "ragged":
        targets[torch.rand(3, 7, generator=generator) < 0.4] = -100
        targets[1] = -100
    return hidden, weight, targets, factors


def leaves(dtype, *tensors):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("chunk_numel", [11 * 1000, 11 * 4, 1], ids=["one chunk", "chunks of 4", "one position each"])
def test_equals_whole_logits_in_value_and_gradient(problem, monkeypatch, chunk_numel, dtype):
    """The factors stand for the gradients that the losses of the sequences send back, each position its own."""
    monkeypatch.setattr(module, "CHUNK_NUMEL", chunk_numel)
    hidden, weight, targets, factors = problem
    exact = leaves(torch.float64, hidden, weight)
    wanted = formula(exact[0] @ exact[1].T, targets)
    wanted_gradients = torch.autograd.grad((factors * wanted).sum(), exact)
    inputs = leaves(dtype, hidden, weight)
    for ours in (linear_log_probs(*inputs, targets), linear_log_probs(inputs[0] @ inputs[1].T, None, targets)):
        assert (ours.shape, ours.dtype) == (targets.shape, dtype)
        assert (ours[targets == -100] == 0).all()
        assert difference(ours, wanted) <= BOUND[dtype]
        gradients = torch.autograd.grad((factors.to(dtype) * ours).sum(), inputs)
        assert (gradients[0][targets == -100] == 0).all()
        for gradient, reference in zip(gradients, wanted_gradients, strict=True):
            assert difference(gradient, reference) <= BOUND[dtype]


def test_gradcheck(problem, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_NUMEL", 11 * 4)
    hidden, weight, targets, _ = problem
    assert torch.autograd.gradcheck(lambda h, w: linear_log_probs(h, w, targets), leaves(torch.float64, hidden, weight))
    logits = leaves(torch.float64, hidden @ weight.T)
    assert torch.autograd.gradcheck(lambda logits: linear_log_probs(logits, None, targets), logits)


def test_logits_exist_for_one_chunk_at_a_time(problem, monkeypatch):
    """No product has more rows than a chunk, and positions without a target are in none."""
    monkeypatch.setattr(module, "CHUNK_NUMEL", 11 * 4)
    hidden, weight, targets, factors = problem
    rows = []
    log_softmax = F.log_softmax
    monkeypatch.setattr(module.F, "log_softmax", lambda x, dim: rows.append(len(x)) or log_softmax(x, dim=dim))
    found = linear_log_probs(*leaves(torch.float64, hidden, weight), targets)
    n = int((targets != -100).sum())
    assert (sum(rows), max(rows)) == (n, 4)
    (factors * found).sum().backward()
    assert (sum(rows), max(rows)) == (2 * n, 4)


def test_nothing_is_kept_without_gradients(problem):
    hidden, weight, targets, _ = problem
    with torch.no_grad():
        found = linear_log_probs(*leaves(torch.float64, hidden, weight), targets)
    assert found.grad_fn is None
    assert torch.equal(found, linear_log_probs(hidden, weight, targets))


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_only_the_needed_gradient_is_formed(problem, frozen, monkeypatch):
    hidden, weight, targets, factors = problem
    inputs = leaves(torch.float64, hidden, weight)
    both = torch.autograd.grad((factors * linear_log_probs(*inputs, targets)).sum(), inputs)
    inputs[frozen] = inputs[frozen].detach()
    given, backward = [], module._LinearLogProbs.backward

    def noting(ctx, grad):
        given.extend(backward(ctx, grad))
        return tuple(given)

    monkeypatch.setattr(module._LinearLogProbs, "backward", staticmethod(noting))
    found = linear_log_probs(*inputs, targets)
    (gradient,) = torch.autograd.grad((factors * found).sum(), inputs[1 - frozen])
    assert torch.equal(gradient, both[1 - frozen])
    assert [gradient is None for gradient in given] == [frozen == 0, frozen == 1, True]


def test_no_target_is_exactly_zero():
    inputs = torch.randn(2, 3, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True)
    targets = torch.full((2, 3), -100)
    for found in (linear_log_probs(*inputs, targets), linear_log_probs(inputs[0] @ inputs[1].T, None, targets)):
        assert found.shape == (2, 3)
        assert (found == 0).all()
        for gradient in torch.autograd.grad(found.sum(), inputs):
            assert (gradient == 0).all()


def test_a_second_derivative_is_refused(problem):
    hidden, weight, targets, _ = problem
    inputs = leaves(torch.float64, hidden, weight)
    (gradient,) = torch.autograd.grad(linear_log_probs(*inputs, targets).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_under_autocast(problem):
    hidden, weight, targets, factors = problem
    inputs, factors = leaves(torch.float32, hidden, weight), factors.float()
    wanted = linear_log_probs(*inputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_log_probs(*inputs, targets)
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, wanted)  # the product did run in bfloat16
    assert difference(ours, wanted) < 0.02  # bfloat16 has 8 bits
    pairs = zip(*(torch.autograd.grad((factors * found).sum(), inputs) for found in (ours, wanted)), strict=True)
    for gradient, reference in pairs:
        assert gradient.dtype == torch.float32
        assert difference(gradient, reference) < 0.02  # as above


def test_a_backward_pass_under_autocast_keeps_the_forward_passs_dtype(problem):
    """Autocast would make the second logits in bfloat16, and their softmax not that of the values."""
    hidden, weight, targets, factors = problem
    inputs, factors = leaves(torch.float32, hidden, weight), factors.float()
    wanted = torch.autograd.grad((factors * linear_log_probs(*inputs, targets)).sum(), inputs)
    total = (factors * linear_log_probs(*inputs, targets)).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradients = torch.autograd.grad(total, inputs)
    for gradient, reference in zip(gradients, wanted, strict=True):
        assert torch.equal(gradient, reference)


def test_logits_of_short_dtypes_are_widened():
    logits = torch.zeros(1, 1, 1000, dtype=torch.bfloat16)
    found = linear_log_probs(logits, None, torch.tensor([[7]]))
    assert found.dtype == torch.float32
    assert difference(found, torch.tensor([[1000.0]]).log().neg()) <= 1e-6


def test_large_logits_stay_finite():
    hidden = torch.tensor([[[1e4], [-1e4]]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    found = linear_log_probs(hidden, weight, torch.tensor([[1, 2]]))
    assert found.tolist() == [[-1e4, 0.0]]
    for gradient in torch.autograd.grad(found.sum(), (hidden, weight)):
        assert torch.isfinite(gradient).all()


# ---- sequences ---------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, -1, -1, -1, -1], [-1] * 8])
TARGETS = torch.tensor([[4, 4, -100, -100, 4, -100, -100, -100], [4, -100, 4, 4, -100, -100, -100, -100], [-100] * 8])


def loop(log_probs, targets, document_ids, n_sequences):
    """Position by position."""
    sums = [[0.0] * n_sequences for _ in targets]
    lengths = [[0.0] * n_sequences for _ in targets]
    for row, documents in enumerate(document_ids.tolist()):
        for place, document in enumerate(documents):
            if targets[row, place] != -100:
                sums[row][document] += log_probs[row, place].item()
                lengths[row][document] += 1
    return sums, lengths


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_sums_over_documents(dtype):
    """Ragged documents, padding, a document without a target (the third of row 0), a row of padding alone."""
    log_probs = -torch.rand(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_probs = torch.where(TARGETS == -100, 0.0, log_probs).to(dtype).requires_grad_()
    sums, lengths = sequence_log_probs(log_probs, TARGETS, DOCUMENTS)
    wanted, wanted_lengths = loop(log_probs.detach(), TARGETS, DOCUMENTS, 3)
    assert sums.shape == (3, 3)
    assert lengths.dtype == sums.dtype == dtype
    assert lengths.tolist() == wanted_lengths == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert difference(sums, torch.tensor(wanted, dtype=dtype)) <= BOUND[dtype]
    assert not lengths.requires_grad
    factors = torch.arange(1.0, 10.0, dtype=dtype).view(3, 3)
    (gradient,) = torch.autograd.grad((factors * sums).sum(), log_probs)
    spread = factors.gather(1, DOCUMENTS.clamp(min=0))
    assert torch.equal(gradient, torch.where(DOCUMENTS < 0, 0.0, spread))


def test_without_documents_each_row_is_a_sequence():
    log_probs = torch.where(TARGETS == -100, 0.0, -torch.rand(3, 8, generator=torch.Generator().manual_seed(1)))
    sums, lengths = sequence_log_probs(log_probs, TARGETS)
    assert lengths.tolist() == [[3], [3], [0]]
    wanted, wanted_lengths = sequence_log_probs(log_probs, TARGETS, torch.zeros_like(DOCUMENTS))
    assert difference(sums, wanted) <= 1e-6
    assert torch.equal(lengths, wanted_lengths)


def test_rows_of_padding_alone_still_have_one_place():
    sums, lengths = sequence_log_probs(torch.zeros(2, 4), torch.full((2, 4), -100), torch.full((2, 4), -1))
    assert sums.tolist() == lengths.tolist() == [[0.0], [0.0]]
