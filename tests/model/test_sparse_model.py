"""A whole model with experts: decoding, packing, padding, recomputation, partition, compilation."""

import copy

import pytest
import torch

from minillm.config import ModelConfig
from minillm.losses import causal_lm_loss
from minillm.model import KVCache, RouterStats, Transformer
from minillm.model.mlp import MLP
from minillm.model.moe import MoE

SPARSE = ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"]


@pytest.fixture(params=SPARSE)
def model(request, tools):
    return tools.model(tools.config(family=request.param, num_hidden_layers=3), dtype=torch.float64)


def distance(a, b):
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-300))


def mask(lengths, seq_len=9):
    return torch.arange(seq_len) < torch.tensor(lengths)[:, None]


def ragged_batch(tools, lengths=(9, 4, 0, 1, 6)):
    """Rows of 9, one of them all padding; 20 tokens, 3 of them not to be learnt."""
    is_token = mask(lengths)
    targets = tools.tokens(len(lengths), 9, seed=3).masked_fill(~is_token, -100)
    targets[0, 2:5] = -100
    document_ids = torch.where(is_token, 0, -1)
    return {"input_ids": tools.tokens(len(lengths), 9), "targets": targets, "document_ids": document_ids}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def make_stats(model):
    return RouterStats(model.config, aux_loss_coef=0.3, z_loss_coef=0.07)


def test_dense_blocks_come_first(tools):
    model = tools.model(tools.config(family="glm4_moe", num_hidden_layers=3, first_k_dense_replace=2))
    assert [type(block.mlp) for block in model.model.layers] == [MLP, MLP, MoE]
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters()
    assert model.model.layers[2].mlp.shared_experts.up_proj.weight.shape == (20, 48)


def test_fresh_weights():
    torch.manual_seed(0)
    config = ModelConfig.preset("moe", num_hidden_layers=2, hidden_size=64, vocab_size=64, num_experts=6)
    model = Transformer(config)
    moe = model.model.layers[1].mlp
    for parameter, std in (
        (moe.gate.weight, 0.02), (moe.experts.gate_up_proj, 0.02), (moe.experts.down_proj, 0.01),
        (moe.shared_experts.down_proj.weight, 0.01),
    ):  # fmt: skip
        assert parameter.std().item() == pytest.approx(std, rel=0.1)
    assert (moe.gate.e_score_correction_bias == 0).all()
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu").reset_parameters()
    assert (model.model.layers[1].mlp.gate.e_score_correction_bias == 0).all()


def test_cached_decoding_equals_the_full_forward(model, tools):
    ids, lengths = tools.tokens(3, 10), [6, 2, 4]
    is_token = mask(lengths, 6)
    cache = KVCache(model.config, batch_size=3, max_len=12, device=torch.device("cpu"), dtype=torch.float64)
    with torch.no_grad():
        prompt = model(ids[:, :6].masked_fill(~is_token, 7), document_ids=torch.where(is_token, 0, -1), cache=cache)
        steps = [model(ids[:, 6 + i, None], cache=cache) for i in range(4)]
        for row, length in enumerate(lengths):
            whole = model(torch.cat([ids[row, :length], ids[row, 6:]])[None])[0]
            ours = torch.cat([prompt[row, :length], *(step[row] for step in steps)])
            assert distance(ours, whole) <= 1e-12


def test_packed_equals_unpacked(model, tools):
    ids, ends = tools.tokens(1, 12), [5, 6, 10]
    document_ids = torch.tensor([[0] * 5 + [1] + [2] * 4 + [-1] * 2])
    packed = model(ids, document_ids=document_ids)
    for start, end in zip([0, 5, 6], ends, strict=True):
        assert distance(packed[:, start:end], model(ids[:, start:end])) <= 1e-12
    packed = packed.detach()
    other = ids.clone()
    other[0, 10:] = 0
    assert torch.equal(model(other, document_ids=document_ids)[:, :10], packed[:, :10])
    other[0, 6:10] = (other[0, 6:10] + 1) % 83
    assert distance(model(other, document_ids=document_ids)[:, :6], packed[:, :6]) <= 1e-12


def test_changing_padding_changes_nothing(model, tools):
    batch, stats = ragged_batch(tools), make_stats(model)
    results = []
    for fill_in in (3, 44):
        changed = batch | {"input_ids": batch["input_ids"].masked_fill(batch["document_ids"] < 0, fill_in)}
        stats.reset()
        loss_sum, _ = causal_lm_loss(model, changed, stats)
        results.append((loss_sum.detach(), stats.counts, gradients(model, loss_sum)))
    (loss_sum, counts, wanted), (other, other_counts, ours) = results
    assert torch.equal(loss_sum, other)
    assert torch.equal(counts, other_counts)
    for name in wanted:
        assert distance(ours[name], wanted[name]) <= 1e-13, name


def test_recomputation_changes_nothing(model, tools):
    results = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        stats, total = make_stats(model), {}
        for batch in (ragged_batch(tools), ragged_batch(tools, [2, 9])):
            loss_sum, _ = causal_lm_loss(model, batch, stats)
            for name, gradient in gradients(model, loss_sum).items():
                total[name] = total.get(name, 0) + gradient
        results.append((loss_sum.detach(), stats.counts, total))
    (loss_sum, counts, wanted), (other, other_counts, ours) = results
    assert torch.equal(loss_sum, other)
    assert torch.equal(counts, other_counts)
    assert counts.sum() == 31 * len(counts) * model.config.num_experts_per_tok  # each token once per sparse layer
    for name in wanted:
        assert distance(ours[name], wanted[name]) <= 1e-14, name


def test_any_partition_gives_the_same_loss(model, tools):
    batch, stats = ragged_batch(tools), make_stats(model)
    loss_sum, n_targets = causal_lm_loss(model, batch, stats)
    plain, _ = causal_lm_loss(model, batch)
    assert loss_sum > plain
    wanted, counts = gradients(model, loss_sum), stats.counts
    for cuts in ([2, 3], [1, 1, 1, 1, 1], [3, 2]):
        stats.reset()
        model.zero_grad()
        total = n_total = 0
        for part in zip(*(tensor.split(cuts) for tensor in batch.values()), strict=True):
            part = dict(zip(batch, part, strict=True))
            longest = max(int((part["document_ids"] >= 0).sum(1).max()), 1)  # padded to another length, too
            part_sum, n = causal_lm_loss(model, {name: t[:, :longest] for name, t in part.items()}, stats)
            part_sum.backward()
            total, n_total = total + part_sum.item(), n_total + n.item()
        assert n_total == n_targets
        assert total == pytest.approx(loss_sum.item(), rel=1e-12)
        assert torch.equal(stats.counts, counts)
        for name, parameter in model.named_parameters():
            assert distance(parameter.grad, wanted[name]) <= 1e-12, name


def test_survives_a_deep_copy(model, tools):
    ids = tools.tokens(2, 6)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids), model(ids))
    with torch.no_grad():
        twin.model.layers[1].mlp.experts.down_proj.zero_()
    assert not torch.equal(twin(ids), model(ids))


def test_compiled_code_serves_all_layers_and_batches(tools):
    """Neither the number of a layer nor the number of tokens per expert may be compiled in."""
    batches = [ragged_batch(tools), ragged_batch(tools, [1, 9, 3, 5, 0]), ragged_batch(tools, [9, 9, 9, 9, 9])]
    n_compiled = []
    for n_layers in (2, 3):
        torch._dynamo.reset()
        model = tools.model(tools.config(family="glm4_moe", num_hidden_layers=n_layers))
        stats, graphs = make_stats(model), []
        wanted = [gradients(model, causal_lm_loss(model, batch, stats)[0]) for batch in batches]

        def backend(graph, _, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        for block in model.model.layers[1:]:
            block.mlp.compile(dynamic=False, backend=backend)
        ours = [gradients(model, causal_lm_loss(model, batch, stats)[0]) for batch in batches]
        n_compiled.append(len(graphs))
        for a, b in zip(ours, wanted, strict=True):
            for name in a:
                assert distance(a[name], b[name]) <= 1e-6, name
    torch._dynamo.reset()
    assert n_compiled[0] == n_compiled[1] > 0
