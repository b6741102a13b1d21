"""Balance loss, z-loss and counts against a loop over rows, tokens and experts."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.model import RouterStats

N_EXPERTS, N_CHOSEN, LENGTHS = 5, 2, [6, 2, 0, 1]


def make_config(**changes):
    values = {"num_experts": N_EXPERTS, "num_experts_per_tok": N_CHOSEN, "num_hidden_layers": 3, "hidden_size": 16}
    return ModelConfig(**(values | {"num_attention_heads": 2} | changes))


def make_stats(aux=0.0, z=0.0, **changes):
    return RouterStats(make_config(**changes), aux_loss_coef=aux, z_loss_coef=z)


def make_batch():
    is_token = torch.arange(6) < torch.tensor(LENGTHS)[:, None]  # (4, 6)
    targets = torch.where(is_token, 1, -100)
    targets[0, 1:4] = -100  # tokens that are routed, but not learnt
    return {"targets": targets, "document_ids": torch.where(is_token, 0, -1)}


def make_layer(seed, kind="softmax"):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 6, N_EXPERTS, dtype=torch.float64, generator=generator).requires_grad_()
    scores = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
    return logits, scores, scores.topk(N_CHOSEN).indices


def slow_losses(logits, scores, chosen, batch):
    """Return Σ_r n_targets(r)·balance(r), Σ_r n_targets(r)·z(r), and the counts: straight from the definitions."""
    balance, z, counts = 0.0, 0.0, [0] * N_EXPERTS
    for row, length in enumerate(LENGTHS):
        n_targets = sum(int(target) != -100 for target in batch["targets"][row])
        for e in range(N_EXPERTS):
            n = sum(e in chosen[row, t].tolist() for t in range(length))
            counts[e] += n
            if length:
                share = sum(scores[row, t, e] / sum(scores[row, t]) for t in range(length)) / length
                balance = balance + n_targets * N_EXPERTS / (N_CHOSEN * length) * n * share
        for t in range(length):
            z = z + n_targets / length * torch.log(sum(torch.exp(logits[row, t]))) ** 2
    return balance, z, counts


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("aux, z", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_equals_the_definition(kind, aux, z):
    stats, batch = make_stats(aux, z, first_k_dense_replace=1, use_qk_norm=True), make_batch()
    layers = [make_layer(seed, kind) for seed in (1, 2)]
    stats.begin(batch)
    stats.record(2, *layers[1])  # in any order
    stats.record(1, *layers[0])
    ours, wanted, counts = stats.finish(), 0.0, []
    for layer in layers:
        balance, zs, count = slow_losses(*layer, batch)
        wanted = wanted + aux * balance + z * zs
        counts.append(count)
    assert ours.dtype == torch.float64
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert stats.counts.tolist() == counts
    assert stats.counts.dtype == torch.float64
    assert not stats.counts.requires_grad
    sums = [sum(slow_losses(*layer, batch)[part].item() for layer in layers) for part in (0, 1)]
    assert stats.sums.tolist() == pytest.approx([*sums, int((batch["targets"] != -100).sum())], rel=1e-12)
    assert not stats.sums.requires_grad
    inputs = [layer[0] for layer in layers]
    for gradient, reference in zip(
        torch.autograd.grad(ours, inputs, retain_graph=True), torch.autograd.grad(wanted, inputs), strict=True
    ):
        assert float((gradient - reference).norm() / reference.norm()) <= 1e-12


def test_perfect_balance_is_one():
    """The minimum of the balance loss is 1, everything on k experts E / k (DeepSeek-V3, equation 17)."""
    config = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    logits, batch = torch.zeros(1, 6, 4), {"targets": torch.zeros(1, 6, dtype=torch.long)}
    for scores, chosen, wanted in (
        (torch.ones(4), [[0, 1], [2, 3]] * 3, 6 * 1.0),
        (torch.tensor([1.0, 1.0, 0.0, 0.0]), [[0, 1]] * 6, 6 * 2.0),
    ):
        stats = make_stats(aux=1.0, **config)
        stats.begin(batch)
        stats.record(0, logits, scores.expand(1, 6, 4), torch.tensor([chosen]))
        assert stats.finish().item() == pytest.approx(wanted)


def test_counts_add_up_until_reset():
    stats, batch, layer = make_stats(num_hidden_layers=1), make_batch(), make_layer(1)
    for _ in range(3):
        stats.begin(batch)
        stats.record(0, *layer)
        stats.finish()
    assert stats.counts.sum() == 3 * 9 * N_CHOSEN
    stats.reset()
    assert stats.counts is None
    stats.begin(batch)
    stats.record(0, *layer)
    stats.finish()
    assert stats.counts.sum() == 9 * N_CHOSEN


def test_a_recomputation_is_not_counted():
    stats, batch, layer = make_stats(0.1, 0.1, num_hidden_layers=1), make_batch(), make_layer(1)
    kept = []
    for _ in range(2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.shape) or t, lambda t: t):
            if not kept:
                stats.begin(batch)
            stats.record(0, *layer)
        kept.append(sizes)
        if len(kept) == 1:
            stats.finish()
    assert kept[0] == kept[1] != []  # what checkpointing compares
    with pytest.raises(RuntimeError, match="recorded nothing"):  # it was not stored
        stats.finish()
    assert stats.counts.sum() == 9 * N_CHOSEN


def test_a_batch_without_targets_adds_exactly_zero():
    stats, batch, layer = make_stats(0.1, 0.1, num_hidden_layers=1), make_batch(), make_layer(1)
    for document_ids in (batch["document_ids"], torch.full((4, 6), -1)):
        stats.begin({"targets": torch.full((4, 6), -100), "document_ids": document_ids})
        stats.record(0, *layer)
        extra = stats.finish()
        assert extra.item() == 0
        assert (torch.autograd.grad(extra, layer[0], retain_graph=True)[0] == 0).all()
    assert stats.counts.sum() == 9 * N_CHOSEN


def test_wrong_order_is_named():
    stats, layer = make_stats(num_hidden_layers=2), make_layer(1)
    with pytest.raises(RuntimeError, match="begin"):
        stats.record(0, *layer)
    stats.begin(make_batch())
    stats.record(0, *layer)
    with pytest.raises(RuntimeError, match="layer 0 recorded twice"):
        stats.record(0, *layer)
    with pytest.raises(RuntimeError, match=r"\[1\] recorded nothing"):
        stats.finish()


@pytest.mark.parametrize("changes", [{}, {"scoring_func": "sigmoid", "n_shared_experts": 1}])
def test_a_router_that_cannot_learn_is_refused(changes):
    with pytest.raises(UserError, match="num_experts_per_tok is 1 and norm_topk_prob"):
        make_stats(num_experts_per_tok=1, **changes)
    make_stats(num_experts_per_tok=1, norm_topk_prob=False, use_qk_norm=True)
