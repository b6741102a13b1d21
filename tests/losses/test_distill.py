"""Distillation against formulas written out in numpy: all divergences, by chunks, by the teacher's best tokens."""

import importlib
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from minillm.errors import UserError
from minillm.losses import (
    IGNORE_INDEX,
    distill_loss,
    hidden_distance,
    linear_distill_loss,
    linear_top_k_distill_loss,
    top_k_teacher,
)

module = importlib.import_module("minillm.losses.distill")
chunked_loss = importlib.import_module("minillm.kernels.chunked_loss")
B, T, V, D, DT = 3, 5, 11, 8, 6  # DT: the teacher's width
DIVERGENCES = module.DIVERGENCES
SETTINGS = [(alpha, temperature) for alpha in (0.0, 0.3, 1.0) for temperature in (1.0, 2.5)]


@pytest.fixture
def case():
    """Hidden states and output layers of both, ragged targets (a row without any), weights; float64."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, :3] = targets[2] = IGNORE_INDEX
    found = {"student_hidden": draw(B, T, D), "student_weight": draw(V, D), "teacher_hidden": draw(B, T, DT)}
    found |= {"teacher_weight": draw(V + 2, DT), "targets": targets}  # two rows of padding in the teacher's embedding
    return found | {"weights": torch.rand(B, T, generator=generator, dtype=torch.float64)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for holder in (module, chunked_loss):  # seven targets: chunks of 3, 3 and 1
        monkeypatch.setattr(holder, "CHUNK_NUMEL", 3 * V)


def columns(ids, log_probs, log_rest):
    return {"teacher_ids": ids, "teacher_log_probs": log_probs, "teacher_log_rest": log_rest}


def softmax(logits):
    exps = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exps) for x in exps]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence_of(p, q, name):
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "js": (kl(p, m) + kl(q, m)) / 2,
    }[name]


def by_hand(case, name, alpha, temperature, *, k=None):
    """One position after the other in Python floats; with k, only the teacher's k best tokens apart."""
    student = (case["student_hidden"] @ case["student_weight"].T).numpy()
    teacher = (case["teacher_hidden"] @ case["teacher_weight"].T).numpy()[..., :V]
    total = count = 0.0
    for row, column in np.ndindex(B, T):
        target = int(case["targets"][row, column])
        if target == IGNORE_INDEX:
            continue
        z, weight = student[row, column].tolist(), float(case["weights"][row, column])
        p, q = (softmax([x / temperature for x in logits]) for logits in (teacher[row, column].tolist(), z))
        if k is not None and k < V:
            order = sorted(range(V), key=lambda i: -p[i])
            p, q = ([each[i] for i in order[:k]] + [sum(each[i] for i in order[k:])] for each in (p, q))
        value = alpha * -math.log(softmax(z)[target]) + (1 - alpha) * temperature**2 * divergence_of(p, q, name)
        total, count = total + weight * value, count + weight
    return total, count


@pytest.mark.parametrize(("alpha", "temperature"), SETTINGS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_value_is_the_formula(case, divergence, alpha, temperature):
    settings = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
    expected, count = by_hand(case, divergence, alpha, temperature)
    loss_sum, n_targets = linear_distill_loss(**case, **settings)
    assert loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert n_targets.item() == pytest.approx(count, rel=1e-12)
    assert n_targets.dtype == torch.float64
    student, teacher = (case[f"{who}_hidden"] @ case[f"{who}_weight"].T for who in ("student", "teacher"))
    whole, _ = distill_loss(student, teacher, case["targets"], case["weights"], **settings)
    assert whole.item() == pytest.approx(expected, rel=1e-12)
    short = {name: value.float() if value.is_floating_point() else value for name, value in case.items()}
    loss_sum, _ = linear_distill_loss(**short, **settings)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 2.0), (0.3, 1.0)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("loss", ["linear", "logits", "top_k"])
def test_gradients_are_those_of_differences(case, loss, divergence, alpha, temperature):
    settings = {"alpha": alpha, "temperature": temperature, "divergence": divergence}
    targets, weights = case["targets"], case["weights"]
    hidden, weight = (case[name].requires_grad_() for name in ("student_hidden", "student_weight"))
    teacher = {name: case[name] for name in ("teacher_hidden", "teacher_weight")}
    if loss == "linear":
        assert gradcheck(
            lambda h, w: linear_distill_loss(h, w, **teacher, targets=targets, weights=weights, **settings)[0],
            (hidden, weight),
            fast_mode=True,  # along random directions; the whole gradient is compared with autograd's below
        )
    elif loss == "logits":
        logits = (hidden @ weight.T).detach().requires_grad_()
        theirs = case["teacher_hidden"] @ case["teacher_weight"].T
        assert gradcheck(lambda z: distill_loss(z, theirs, targets, weights, **settings)[0], (logits,))
    else:
        best = top_k_teacher(**teacher, targets=targets, k=4, temperature=temperature, vocab_size=V)
        assert gradcheck(
            lambda h, w: linear_top_k_distill_loss(h, w, *best, targets, weights, **settings)[0],
            (hidden, weight),
            fast_mode=True,
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_by_chunks_are_those_of_whole_logits(case, divergence, double):
    """The whole side is ordinary autograd on the logits of both."""
    bound, dtype = (1e-12, torch.float64) if double else (1e-6, torch.float32)
    case = {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.items()}
    hidden, weight = (case[name].requires_grad_() for name in ("student_hidden", "student_weight"))
    loss_sum, _ = linear_distill_loss(**case, alpha=0.4, temperature=2.0, divergence=divergence)
    ours = torch.autograd.grad(loss_sum, (hidden, weight))
    z = hidden @ weight.T
    p = F.log_softmax((case["teacher_hidden"] @ case["teacher_weight"].T)[..., :V] / 2, -1)
    q = F.log_softmax(z / 2, -1)
    m = ((p.exp() + q.exp()) / 2).log()
    one, other = ((a.exp() * (a - b)).sum(-1) for a, b in ((p, q), (q, p)))
    js = ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2
    found = {"forward": one, "reverse": other, "symmetric": (one + other) / 2, "js": js}[divergence]
    ce = F.cross_entropy(z.flatten(0, 1), case["targets"].flatten(), reduction="none").view(B, T)
    counted = case["targets"] != IGNORE_INDEX
    expected = ((0.4 * ce + 0.6 * 4 * found) * case["weights"])[counted].sum()
    assert abs(loss_sum - expected).item() / abs(expected).item() < bound
    for mine, theirs in zip(ours, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert ((mine - theirs).norm() / theirs.norm()).item() < bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_distilled_into_itself_has_no_gradient(divergence, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, D, requires_grad=True), (3 * torch.randn(V, D)).requires_grad_()
    targets = torch.randint(0, V, (40,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss_sum, _ = linear_distill_loss(hidden, weight, hidden, weight, targets, divergence=divergence)
    assert loss_sum.item() == 0
    for gradient in torch.autograd.grad(loss_sum, (hidden, weight)):
        assert gradient.norm().item() <= 1e-7


def test_js_tells_models_apart_that_are_close():
    """A divergence is of second order: in float32 it must not drown in the roundings of the logarithms."""
    generator = torch.Generator().manual_seed(5)
    teacher = 3 * torch.randn(50, 400, generator=generator)
    student = teacher + 1e-3 * torch.randn(50, 400, generator=generator)
    targets = torch.zeros(50, dtype=torch.long)
    short, exact = (
        distill_loss(student.to(dtype), teacher.to(dtype), targets, divergence="js")[0].item()
        for dtype in (torch.float32, torch.float64)
    )
    assert short == pytest.approx(exact, rel=1e-3)  # logits near 1 hold a gap of 1e-3 to some four digits


def test_the_teacher_gets_no_gradient(case):
    for name in ("teacher_hidden", "teacher_weight", "student_hidden"):
        case[name].requires_grad_()
    loss_sum, _ = linear_distill_loss(**case)
    loss_sum.backward()
    assert case["teacher_hidden"].grad is None
    assert case["teacher_weight"].grad is None
    assert case["student_hidden"].grad.norm() > 0
    assert case["student_weight"].grad is None  # which asked for none


def test_logits_exist_for_one_chunk_at_a_time(case, monkeypatch):
    """No softmax has more rows than a chunk, and positions without a target are in none."""
    rows, log_softmax = [], F.log_softmax
    monkeypatch.setattr(module.F, "log_softmax", lambda x, dim: rows.append(len(x)) or log_softmax(x, dim=dim))
    n = int((case["targets"] != IGNORE_INDEX).sum())
    linear_distill_loss(**case)
    assert (sum(rows), max(rows)) == (2 * n, 3)  # of both models
    rows.clear()
    top_k_teacher(case["teacher_hidden"], case["teacher_weight"], case["targets"], k=2)
    assert (sum(rows), max(rows)) == (n, 2)  # its vocabulary is larger


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_only_the_needed_gradient_is_formed(case, frozen):
    inputs = [case.pop(name).requires_grad_() for name in ("student_hidden", "student_weight")]
    both = torch.autograd.grad(linear_distill_loss(*inputs, **case)[0], inputs)
    inputs[frozen] = inputs[frozen].detach()
    loss_sum, _ = linear_distill_loss(*inputs, **case)
    kept = loss_sum.grad_fn.saved_tensors
    assert [saved is None for saved in kept] == [frozen == 0, frozen == 1]
    assert torch.equal(torch.autograd.grad(loss_sum, inputs[1 - frozen])[0], both[1 - frozen])


def test_a_second_derivative_is_refused(case):
    """The gradient is formed in the forward pass, as a constant: its own derivative would silently be wrong."""
    hidden = case["student_hidden"].requires_grad_()
    loss_sum, _ = linear_distill_loss(**case)
    (gradient,) = torch.autograd.grad(loss_sum.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_pieces_add_up(case, divergence):
    whole, n_whole = linear_distill_loss(**case, divergence=divergence, alpha=0.2)
    parts = []
    for row in range(B):
        piece = {name: v if name.endswith("_weight") else v[row : row + 1] for name, v in case.items()}
        parts.append(linear_distill_loss(**piece, divergence=divergence, alpha=0.2))
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert sum(p[1] for p in parts).item() == pytest.approx(n_whole.item(), rel=1e-12)
    assert (parts[2][0].item(), parts[2][1].item()) == (0, 0)  # a row without targets


@pytest.mark.parametrize("loss", ["linear", "top_k"])
def test_without_targets_all_is_exactly_nothing(case, loss):
    case["targets"][:] = IGNORE_INDEX
    case["student_hidden"][:] = float("inf")  # what stands there must not matter
    hidden, weight = (case[name].requires_grad_() for name in ("student_hidden", "student_weight"))
    if loss == "linear":
        loss_sum, n_targets = linear_distill_loss(**case)
    else:
        teacher = {name: case.pop(name) for name in ("teacher_hidden", "teacher_weight")}
        best = top_k_teacher(**teacher, targets=case["targets"], k=2)
        loss_sum, n_targets = linear_top_k_distill_loss(**columns(*best), **case)
    assert (loss_sum.item(), n_targets.item()) == (0, 0)
    for gradient in torch.autograd.grad(loss_sum, (hidden, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_best_tokens_with_the_rest_as_one(case, divergence, k):
    """Equal to the formula over k + 1 kinds of token; exact from V - 1 on, else a lower bound."""
    teacher = {name: case[name] for name in ("teacher_hidden", "teacher_weight")}
    student = {name: value for name, value in case.items() if not name.startswith("teacher")}
    best = top_k_teacher(**teacher, targets=case["targets"], k=k, temperature=1.5, vocab_size=V)
    assert [column.shape for column in best] == [(B, T, k), (B, T, k), (B, T, 1)]
    settings = {"alpha": 0.2, "temperature": 1.5, "divergence": divergence}
    found, _ = linear_top_k_distill_loss(**columns(*best), **student, **settings)
    assert found.item() == pytest.approx(by_hand(case, divergence, 0.2, 1.5, k=k)[0], rel=1e-9)
    whole, _ = linear_distill_loss(**case, **settings)
    if k >= V - 1:
        assert found.item() == pytest.approx(whole.item(), rel=1e-9)
    else:
        assert found.item() < whole.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_rest_below_rounding_is_never_more_than_the_truth(case, divergence, dtype):
    """A teacher so sure that 1 - Σ p would be noise, whose logarithm counts whenever the student errs."""
    case["teacher_weight"] *= 8
    teacher = {name: case[name] for name in ("teacher_hidden", "teacher_weight")}
    student = {name: case[name] for name in ("student_hidden", "student_weight", "targets", "weights")}
    ids, log_probs, log_rest = top_k_teacher(**teacher, targets=case["targets"], k=4, vocab_size=V)
    best = columns(ids, log_probs.to(dtype), log_rest.float())
    found, _ = linear_top_k_distill_loss(**best, **student, divergence=divergence)
    truth = by_hand(case, divergence, 0, 1, k=4)[0]
    # A divergence is of second order in the roundings of p, where p is near q; elsewhere of first.
    assert found.item() == pytest.approx(truth, rel=2 * torch.finfo(dtype).eps)
    assert found.item() <= by_hand(case, divergence, 0, 1)[0] * (1 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_model_distilled_into_itself_by_its_best_tokens_has_nothing_to_learn(divergence):
    """Log-probabilities as they lie on disk, in float16: the best token has nearly all, the rest 1e-9 of it."""
    logits = torch.tensor([[16.0, 8.0, 0.0, -4.0]], requires_grad=True)
    targets = torch.zeros(1, dtype=torch.long)
    for k in (1, 2, 3, 4):
        ids, log_probs, log_rest = top_k_teacher(logits, None, targets, k=k)
        best = columns(ids, log_probs.half(), log_rest)
        loss_sum, _ = linear_top_k_distill_loss(logits, None, **best, targets=targets, divergence=divergence)
        assert abs(loss_sum.item()) <= 1e-7
        assert torch.autograd.grad(loss_sum, logits)[0].abs().max().item() <= 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_but_one_token_of_a_sure_teacher_are_the_whole_teacher(divergence):
    teacher, student = torch.tensor([[16.0, 8.0, 0.0, -4.0]]), torch.tensor([[3.0, 9.0, 1.0, 2.0]])
    targets = torch.zeros(1, dtype=torch.long)
    whole, _ = distill_loss(student.double(), teacher.double(), targets, divergence=divergence)
    best = columns(*top_k_teacher(teacher, None, targets, k=3))
    found, _ = linear_top_k_distill_loss(student, None, **best, targets=targets, divergence=divergence)
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_without_other_tokens_has_a_finite_loss(divergence):
    """Its vocabulary ends before the student's, and all of it is among the best."""
    teacher, student = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0, 2.0, 0.0, -30.0]], requires_grad=True)
    targets = torch.zeros(1, dtype=torch.long)
    best = columns(*top_k_teacher(teacher, None, targets, k=3))
    found, _ = linear_top_k_distill_loss(student, None, **best, targets=targets, divergence=divergence)
    assert abs(found.item()) < 1e-6
    assert torch.autograd.grad(found, student)[0].abs().max().item() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_sure_learns_of_the_rest(case, divergence):
    """In float32 its best tokens sum to 1; what is left is exact all the same, and so is its gradient."""
    case["student_weight"] *= 8
    found = []
    for dtype in (torch.float32, torch.float64):
        here = {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.items()}
        hidden = here.pop("student_hidden").requires_grad_()
        teacher = {name: here.pop(name) for name in ("teacher_hidden", "teacher_weight")}
        ids = (hidden @ here["student_weight"].T).topk(4).indices  # a teacher who knows the student's best ones
        log_probs = torch.log_softmax((teacher["teacher_hidden"] @ teacher["teacher_weight"].T)[..., :V], -1)
        log_rest = log_probs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        best = columns(ids, log_probs.gather(-1, ids), log_rest)
        loss_sum, _ = linear_top_k_distill_loss(hidden, **best, **here, divergence=divergence)
        found.append((loss_sum.item(), *torch.autograd.grad(loss_sum, hidden)))
    (short, short_gradient), (exact, gradient) = found
    assert short == pytest.approx(exact, rel=2e-6)
    assert ((short_gradient - gradient).norm() / gradient.norm()).item() < 1e-5  # of logits as large as 100


def test_a_batch_without_rows_is_nothing(case):
    case |= {name: value[:0] for name, value in case.items() if not name.endswith("_weight")}
    assert [x.item() for x in linear_distill_loss(**case)] == [0, 0]


def test_autocast_multiplies_in_its_dtype(case):
    case = {name: value.float() if value.is_floating_point() else value for name, value in case.items()}
    plain, _ = linear_distill_loss(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        short, _ = linear_distill_loss(**case)
    assert short.dtype == torch.float32
    assert short.item() != plain.item()
    assert short.item() == pytest.approx(plain.item(), rel=3e-2)


def test_hidden_states_are_compared_at_length_1(case):
    student, teacher = case["student_hidden"], torch.randn(B, T, D, dtype=torch.float64)
    expected = count = 0.0
    for row, column in np.ndindex(B, T):
        if case["targets"][row, column] != IGNORE_INDEX:
            one, other = (h[row, column] / h[row, column].norm() for h in (student, teacher))
            weight = case["weights"][row, column].item()
            expected, count = expected + weight * (one - other).square().sum().item(), count + weight
    found, n_targets = hidden_distance(student, teacher, case["targets"], case["weights"])
    assert (found.item(), n_targets.item()) == pytest.approx((expected, count), rel=1e-12)
    assert gradcheck(lambda h: hidden_distance(h, teacher, case["targets"])[0], (student.requires_grad_(),))
    assert hidden_distance(3 * teacher, teacher, case["targets"])[0].item() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_agrees(case, beta, temperature):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = (case[f"{who}_hidden"] @ case[f"{who}_weight"].T for who in ("student", "teacher"))
    student.requires_grad_()
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher[..., :V], labels=case["targets"], beta=beta, temperature=temperature, reduction="sum"
    )
    name = {0.0: "forward", 0.5: "js", 1.0: "reverse"}[beta]
    ours, _ = distill_loss(student, teacher, case["targets"], divergence=name, temperature=temperature)
    theirs = theirs * temperature**2  # which has no T² of its own
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-10)
    gradient, reference = (torch.autograd.grad(loss_sum, student)[0] for loss_sum in (ours, theirs))
    assert ((gradient - reference).norm() / reference.norm()).item() < 1e-10


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"alpha": 1.5}, "alpha"), ({"divergence": "l2"}, "l2")]
    + [({"temperature": value}, "temperature") for value in (0.0, -1.0, math.inf, math.nan)],
)
def test_settings_out_of_range_are_refused(case, settings, word):
    with pytest.raises(UserError, match=word):
        linear_distill_loss(**case, **settings)
    best = torch.zeros(B, T, 2, dtype=torch.long), torch.zeros(B, T, 2), torch.zeros(B, T, 1)
    student = case["student_hidden"], case["student_weight"]
    with pytest.raises(UserError, match=word):
        linear_top_k_distill_loss(*student, *best, case["targets"], **settings)
    if "temperature" in settings:
        with pytest.raises(UserError, match=word):
            top_k_teacher(*student, case["targets"], k=2, **settings)


def test_vocabularies_must_fit(case):
    with pytest.raises(UserError, match="knows 5 tokens, the student 11"):
        linear_distill_loss(**(case | {"teacher_weight": case["teacher_weight"][:5]}))
    for k in (0, V + 3):
        with pytest.raises(UserError, match=f"top_k {k}"):
            top_k_teacher(case["teacher_hidden"], case["teacher_weight"], case["targets"], k=k)
